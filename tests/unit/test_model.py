"""The model against the papers: sizes, initial values, a naive re-implementation, the loss, and document borders."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from mamba_kernels.mamba2_mixer import reference as mixer_reference
from megatron_mamba.config import ModelConfig, from_dict
from megatron_mamba.model import LanguageModel, build, lm, mamba, norm
from megatron_mamba.model.flops import flops_per_token
from megatron_mamba.model.parameters import Init, ParameterSpec, count, initial_values, parameter_table
from megatron_mamba.parallel.context import ParallelContext
from megatron_mamba.parallel.vocab import IGNORE
from tiny import ARCHITECTURES, assert_equal, gradients, one_process, random_model, random_tokens, tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with one_process() as context:
        yield context


@pytest.fixture(params=ARCHITECTURES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ARCHITECTURES[request.param]


def named(name: str) -> ModelConfig:
    return from_dict(ModelConfig, yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text()))


def weights(model: LanguageModel) -> dict[str, Tensor]:
    """Every parameter as a plain tensor."""
    return {name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------- sizes and initial values


@pytest.mark.parametrize(
    ("name", "parameters", "gigaflops"),
    [
        ("transformer_8b", 8_540_135_424, 48.2),
        ("mamba_8b", 8_148_783_104, None),
        ("mamba2_8b", 8_236_999_680, 44.3),
        ("hybrid_8b", 8_654_517_248, 46.6),
    ],
)
def test_8b_models(context: ParallelContext, name: str, parameters: int, gigaflops: float | None) -> None:
    """Parameters of the paper's models exactly, counted on the real modules; training FLOPs per token at 4096."""
    config = named(name)
    model = build(config, context, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: row.shape for n, row in parameter_table(config).items()}
    assert count(config) == parameters
    if gigaflops is not None:
        assert 3e-9 * flops_per_token(config, 4096) == pytest.approx(gigaflops, rel=0.01)


@pytest.mark.parametrize("kind", ["normal", "uniform", "log_uniform", "dt_bias", "log_range", "constant"])
def test_slices_of_initial_values(kind: str) -> None:
    """Any slice, inside a block of the generator, across two or over several, is that slice of the whole."""
    bounds = {"dt_bias": (1e-3, 1e-1, 1e-4), "log_uniform": (1.0, 16.0)}.get(kind, (0.5,))
    spec = ParameterSpec("layers.0.mixer.w", (2503, 1001), "eD", Init(kind, *bounds))
    whole = initial_values(spec, 7, (slice(None), slice(None)), torch.float32)
    for rows in (slice(0, 1), slice(1040, 1060), slice(2502, 2503), slice(17, 2200), slice(5, 5)):
        for columns in (slice(None), slice(250, 500)):
            assert torch.equal(initial_values(spec, 7, (rows, columns), torch.float32), whole[rows, columns])
    joined = [initial_values(spec, 7, (slice(i, i + 626), slice(None)), torch.float32) for i in range(0, 2503, 626)]
    assert torch.equal(torch.cat(joined), whole)


def test_slices_of_an_initial_vector() -> None:
    spec = ParameterSpec("final_norm.weight", (2503,), "D", Init("uniform", 1.0))
    whole = initial_values(spec, 7, (slice(None),), torch.float64)
    assert torch.equal(initial_values(spec, 7, (slice(9, 99),), torch.float64), whole[9:99])


def test_initial_values_depend_on_name_seed_and_block() -> None:
    spec = ParameterSpec("layers.0.mixer.w", (2200, 1000), "eD", Init("normal", 1.0))

    def draw(spec: ParameterSpec, seed: int) -> Tensor:
        return initial_values(spec, seed, (slice(None), slice(None)), torch.float32)

    whole = draw(spec, 7)
    others = [draw(replace(spec, name="layers.1.mixer.w"), 7), draw(spec, 8)]
    # Blocks are 2^20 // 1000 = 1048 rows: one that repeats another would show at this distance.
    others.append(whole.roll(1048, 0))
    for other in others:
        correlation = (whole * other).mean().item()
        assert abs(correlation) < 5 / whole.numel() ** 0.5
    assert torch.equal(draw(spec, 7), whole)


def test_model_holds_the_global_initial_values(context: ParallelContext, config: ModelConfig) -> None:
    """What build() puts into each parameter is its row's global tensor."""
    model = build(config, context, seed=5)
    table = parameter_table(config)
    values = weights(model)
    assert values.keys() == table.keys()
    for name, row in table.items():
        assert torch.equal(values[name], initial_values(row, 5, tuple(slice(None) for _ in row.shape), torch.float32)), name


WIDE = tiny(
    "mM*-",
    norm="layernorm",
    hidden_size=256,
    vocab_size=1000,
    mamba={"d_inner": 512, "state_size": 16, "dt_rank": 16},
    mamba2={"d_inner": 16384, "head_dim": 8, "state_size": 16},
    attention={"head_dim": 64},
    mlp={"ffn_size": 512, "activation": "swiglu"},
    init={"depth": 9},
)
UNIFORM = {  # half width: 1 / sqrt(fan in), and of dt_proj 1 / sqrt(rank)
    "mamba.in_proj_x": 256, "mamba.in_proj_z": 256, "mamba.conv_weight": 4, "mamba.conv_bias": 4, "mamba.x_proj": 512,
    "mamba.dt_proj": 16, "mamba2.in_proj_z": 256, "mamba2.in_proj_x": 256, "mamba2.in_proj_B": 256, "mamba2.in_proj_C": 256,
    "mamba2.in_proj_dt": 256, "mamba2.conv_x_weight": 4, "mamba2.conv_B_weight": 4, "mamba2.conv_C_weight": 4,
    "mamba2.conv_x_bias": 4, "mamba2.conv_B_bias": 4, "mamba2.conv_C_bias": 4,
}  # fmt: skip
NORMAL = {
    "embedding.weight": 0.02, "output.weight": 0.02, "attention.q_proj": 0.02, "attention.k_proj": 0.02,
    "attention.v_proj": 0.02, "mlp.up_proj": 0.02, "mlp.gate_proj": 0.02, "mamba.out_proj": 0.02 / 3, "mamba2.out_proj": 0.02 / 3,
    "attention.out_proj": 0.02 / 18**0.5, "mlp.down_proj": 0.02 / 18**0.5,
}  # fmt: skip
CONSTANT = {"norm.weight": 1.0, "norm.bias": 0.0, "mamba.D": 1.0, "mamba2.D": 1.0, "mamba2.norm_weight": 1.0}


def test_logarithms_are_taken_in_one_thread(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL's first ones in a process, in two threads at once, can be wrong by 6e-5 (in one process of a thousand or so)."""
    threads: dict[str, set[str]] = {"drawn": set(), "computed": set()}

    def recorded(row: ParameterSpec, *arguments: Any) -> Tensor:
        kind = "drawn" if row.init.kind in ("normal", "uniform", "constant") else "computed"
        threads[kind].add(threading.current_thread().name)
        return initial_values(row, *arguments)

    monkeypatch.setattr(lm.parameters, "initial_values", recorded)
    build(tiny("mM*-"), context)
    assert threads["computed"] == {threading.current_thread().name}
    assert threads["drawn"].isdisjoint(threads["computed"])


def test_initial_distributions(context: ParallelContext) -> None:
    """Every kind of parameter: bounds, standard deviation, or value."""
    seen = set()
    for name, value in weights(build(WIDE, context)).items():
        part = name.split(".")
        key = f"{WIDE.layers[int(part[1])]}.{part[3]}" if "mixer" in part else name if "norm" not in name else f"norm.{part[-1]}"
        seen.add(key)
        wide = value.double()
        noise = 4 / value.numel() ** 0.5
        if key in UNIFORM:
            bound = UNIFORM[key] ** -0.5
            assert wide.abs().max() <= bound * (1 + 1e-6), name
            assert wide.std().item() == pytest.approx(bound / 3**0.5, rel=noise), name
            assert abs(wide.mean().item()) < bound * noise, name
        elif key in NORMAL:
            assert wide.std().item() == pytest.approx(NORMAL[key], rel=noise), name
            assert wide.abs().max() > 3 * NORMAL[key], name
        elif key in CONSTANT:
            assert (value == CONSTANT[key]).all(), name
        elif key == "mamba.A_log":
            assert_equal(wide.exp(), torch.arange(1.0, 17.0, dtype=torch.float64).expand(512, -1), name, 1e-6)
        elif key == "mamba2.A_log":
            assert wide.exp().min() >= 1 - 1e-6
            assert wide.exp().max() <= 16 * (1 + 1e-6)
            assert wide.exp().mean().item() == pytest.approx(8.5, abs=15 / 12**0.5 * noise)
        else:
            assert key in ("mamba.dt_bias", "mamba2.dt_bias"), name
            dt = F.softplus(wide).log()
            assert math.log(1e-3) - 1e-4 <= dt.min()
            assert dt.max() <= math.log(1e-1) + 1e-4
            assert dt.mean().item() == pytest.approx(math.log(1e-2), abs=math.log(100) / 12**0.5 * noise)
    others = {"mamba.A_log", "mamba2.A_log", "mamba.dt_bias", "mamba2.dt_bias"}
    assert seen == UNIFORM.keys() | NORMAL.keys() | CONSTANT.keys() | others


def test_dt_floor_and_layernorm1p(context: ParallelContext) -> None:
    config = tiny("M*", norm="layernorm1p", init={"dt_min": 1e-6, "dt_max": 1e-3, "dt_floor": 5e-4})
    values = weights(build(config, context))
    assert F.softplus(values["layers.0.mixer.dt_bias"].double()).min().item() == pytest.approx(5e-4, rel=1e-4)
    assert (values["final_norm.weight"] == 0).all()
    assert (values["layers.1.norm.bias"] == 0).all()


# ------------------------------------------------------------------------------------------- naive re-implementation
# Token by token and head by head, from the papers' equations; nothing is shared with the model but parameter names.

Weights = dict[str, Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = weight.shape[1]
    rows = []
    for t in range(len(x)):
        taps = [weight[:, k] * x[t - width + 1 + k] for k in range(width) if t - width + 1 + k >= 0]
        rows.append(silu(bias + sum(taps)))
    return torch.stack(rows)


def naive_mamba2(u: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    c = config.mamba2
    z, dt = u @ w["in_proj_z"].T, torch.log1p(torch.exp(u @ w["in_proj_dt"].T + w["dt_bias"]))
    x, B, C = (naive_conv(u @ w[f"in_proj_{k}"].T, w[f"conv_{k}_weight"], w[f"conv_{k}_bias"]) for k in ("x", "B", "C"))
    size, states, rows = c.d_inner // c.n_groups, torch.zeros(c.n_heads, c.head_dim, c.state_size, dtype=u.dtype), []
    for t in range(len(u)):
        y = torch.zeros(c.d_inner, dtype=u.dtype)
        for h in range(c.n_heads):
            channels = slice(h * c.head_dim, (h + 1) * c.head_dim)
            group = slice(h // (c.n_heads // c.n_groups) * c.state_size, (h // (c.n_heads // c.n_groups) + 1) * c.state_size)
            decay = torch.exp(-torch.exp(w["A_log"][h]) * dt[t, h])
            states[h] = decay * states[h] + dt[t, h] * torch.outer(x[t, channels], B[t, group])
            y[channels] = states[h] @ C[t, group] + w["D"][h] * x[t, channels]
        y = y * silu(z[t])
        for g in range(c.n_groups):
            part = y[g * size : (g + 1) * size]
            y[g * size : (g + 1) * size] = part / torch.sqrt((part * part).mean() + config.norm_eps)
        rows.append(y * w["norm_weight"])
    return torch.stack(rows) @ w["out_proj"].T


def naive_mamba(u: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    c = config.mamba
    x = naive_conv(u @ w["in_proj_x"].T, w["conv_weight"], w["conv_bias"])
    state, rows = torch.zeros(c.d_inner, c.state_size, dtype=u.dtype), []
    for t in range(len(u)):
        selected = w["x_proj"] @ x[t]
        low_rank, B, C = selected[: c.dt_rank], selected[c.dt_rank : -c.state_size], selected[-c.state_size :]
        dt = torch.log1p(torch.exp(w["dt_proj"] @ low_rank + w["dt_bias"]))
        for n in range(c.state_size):
            state[:, n] = torch.exp(-torch.exp(w["A_log"][:, n]) * dt) * state[:, n] + dt * B[n] * x[t]
        rows.append(state @ C + w["D"] * x[t])
    return (torch.stack(rows) * silu(u @ w["in_proj_z"].T)) @ w["out_proj"].T


def naive_rotate(head: Tensor, position: int, c: Any) -> Tensor:
    out, half = head.clone(), c.rotary_dim // 2
    for i in range(half):
        angle = position * c.rope_base ** (-2 * i / c.rotary_dim)
        a, b = head[i], head[i + half]
        out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def naive_attention(u: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    c = config.attention
    q, k, v = ((u @ w[f"{name}_proj"].T).unflatten(1, (-1, c.head_dim)) for name in "qkv")
    rows = []
    for t in range(len(u)):
        heads = []
        for h in range(c.n_heads):
            shared = h // (c.n_heads // c.n_kv_heads)
            query = naive_rotate(q[t, h], t, c)
            scores = torch.stack([query @ naive_rotate(k[s, shared], s, c) for s in range(t + 1)]) / math.sqrt(c.head_dim)
            probabilities = torch.exp(scores) / torch.exp(scores).sum()
            heads.append(probabilities @ v[: t + 1, shared])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["out_proj"].T


def naive_mlp(u: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    up = u @ w["up_proj"].T
    activations: dict[str, Callable[[], Tensor]] = {
        "gelu": lambda: 0.5 * up * (1 + torch.erf(up / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))),
        "squared_relu": lambda: torch.clamp(up, min=0) ** 2,
        "swiglu": lambda: silu(u @ w["gate_proj"].T) * up,
    }
    return activations[config.mlp.activation]() @ w["down_proj"].T


def naive_norm(x: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    if config.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(1, keepdim=True) + config.norm_eps) * w["weight"]
    centred = x - x.mean(1, keepdim=True)
    scale = w["weight"] + (1 if config.norm == "layernorm1p" else 0)
    return centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + config.norm_eps) * scale + w["bias"]


NAIVE = {"mamba2": naive_mamba2, "mamba": naive_mamba, "attention": naive_attention, "mlp": naive_mlp}


def naive_logits(tokens: Tensor, values: Weights, config: ModelConfig) -> Tensor:
    """Logits `[S, V]` of one document `[S]`."""

    def under(prefix: str) -> Weights:
        return {name.removeprefix(f"{prefix}."): value for name, value in values.items() if name.startswith(f"{prefix}.")}

    x = values["embedding.weight"][tokens]
    for i, kind in enumerate(config.layers):
        x = x + NAIVE[kind](naive_norm(x, under(f"layers.{i}.norm"), config), under(f"layers.{i}.mixer"), config)
    return naive_norm(x, under("final_norm"), config) @ values.get("output.weight", values["embedding.weight"]).T


def naive_length(config: ModelConfig) -> int:
    """Several chunks of the scans where there is no attention, whose naive form is quadratic in Python."""
    return 19 if "attention" in config.layers else 70


@torch.no_grad()
def test_model_equals_naive_model(context: ParallelContext, config: ModelConfig) -> None:
    model = random_model(config, context, sharded=False)
    tokens = random_tokens(2, naive_length(config))
    values = weights(model)
    expected = torch.stack([naive_logits(row, values, config) for row in tokens])
    assert_equal(model(tokens), expected, "logits")
    assert_equal(model(tokens, last_only=True), expected[:, -1], "last logits")


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "squared_relu", "swiglu"])
@pytest.mark.parametrize("normalisation", ["rmsnorm", "layernorm", "layernorm1p"])
def test_mlp_and_norm_kinds_equal_naive(context: ParallelContext, activation: str, normalisation: str) -> None:
    config = tiny("-", norm=normalisation, mlp={"activation": activation})
    model = random_model(config, context, sharded=False)
    tokens = random_tokens(1, 9)
    assert_equal(model(tokens)[0], naive_logits(tokens[0], weights(model), config), "logits")


# ----------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", ["hybrid", "everything"])
def test_loss_in_chunks(context: ParallelContext, name: str, chunk: int) -> None:
    """Loss and every gradient of the chunked loss are those of cross-entropy on full logits; ignored labels count nothing."""
    model = random_model(ARCHITECTURES[name], context)
    tokens, labels = random_tokens(2, 13), random_tokens(2, 13, seed=1)
    labels[0, 3:6], labels[1, 12] = IGNORE, -1
    loss = model(tokens, labels_BS=labels, scale=0.3, chunk_tokens=chunk)
    (2.0 * loss).backward()
    found = gradients(model)
    counted = labels.flatten() >= 0
    expected = 0.3 * F.cross_entropy(model(tokens).flatten(0, 1)[counted], labels.flatten()[counted], reduction="sum")
    (2.0 * expected).backward()
    assert_equal(loss.detach(), expected.detach(), "loss", 1e-12)
    for parameter, gradient in gradients(model).items():
        assert_equal(found[parameter], gradient, parameter)


def test_loss_without_any_label(context: ParallelContext) -> None:
    model = random_model(tiny("M-"), context)
    loss = model(random_tokens(1, 5), labels_BS=torch.full((1, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_tied_gradient_is_the_sum_of_both(context: ParallelContext) -> None:
    tied = random_model(tiny("M-", tie_embeddings=True), context)
    untied = random_model(tiny("M-"), context)
    values = weights(tied)
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            target.copy_(values["embedding.weight" if name == "output.weight" else name])
    assert "output.weight" not in values
    tokens, labels = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    losses = []
    for model in (tied, untied):
        losses.append(model(tokens, labels_BS=labels))
        losses[-1].backward()
    found, expected = gradients(tied), gradients(untied)
    expected["embedding.weight"] += expected.pop("output.weight")
    assert_equal(losses[0].detach(), losses[1].detach(), "loss", 1e-14)
    for name, gradient in expected.items():
        assert_equal(found[name], gradient, name)


# -------------------------------------------------------------------------------------------------- document borders


def test_packed_documents_equal_documents_apart(context: ParallelContext, config: ModelConfig) -> None:
    """Loss of every token and every gradient; documents of one token, borders inside and between chunks, rows cut differently."""
    model = random_model(config, context)
    rows = [[1, 70, 3, 16], [66, 20, 2, 2]]
    tokens, labels = random_tokens(2, 90), random_tokens(2, 90, seed=1)
    starts = torch.zeros(2, 90, dtype=torch.bool)
    apart, pieces = [], []
    for row, lengths in enumerate(rows):
        starts[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
        pieces += list(zip(tokens[row].split(lengths), labels[row].split(lengths), strict=True))
    model(tokens, labels_BS=labels, document_start_BS=starts).backward()
    packed_gradients = gradients(model)
    with torch.no_grad():
        packed = F.cross_entropy(model(tokens, document_start_BS=starts).flatten(0, 1), labels.flatten(), reduction="none")
    for piece, target in pieces:
        with torch.no_grad():
            apart.append(F.cross_entropy(model(piece[None])[0], target, reduction="none"))
        model(piece[None], labels_BS=target[None]).backward()
    assert_equal(packed, torch.cat(apart), "loss of each token")
    for name, gradient in gradients(model).items():
        assert_equal(packed_gradients[name], gradient, name)
    if set(config.layers) != {"mlp"}:
        with torch.no_grad():
            unmasked = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none")
        assert (unmasked - packed).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- precision


def test_bf16_keeps_some_parameters_in_fp32(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ops are given under precision=bf16: activations and matrices bf16; A, D, dt_bias and norm weights fp32."""
    given: dict[str, set[torch.dtype]] = {}

    def watch(module: Any, op: str, **positions: int) -> None:
        original = getattr(module, op)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = {name: args[i] for name, i in positions.items()} | {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
            for name, value in found.items():
                given.setdefault(f"{op}.{name}", set()).add(value.dtype)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, op, watched)

    watch(mixer_reference, "ssd", x=0, dt=1, A=2, B=3, C=4)
    watch(mixer_reference, "gated_norm", y=0, z=1, weight=2)
    watch(mixer_reference, "causal_conv1d", x=0, weight=1, bias=2)
    watch(mamba, "selective_scan", x=0, dt=1, A=2, B=3, C=4)
    watch(norm, "rms_norm", x=0, weight=1)
    model = random_model(tiny("Mm*-"), context, precision="bf16")
    tokens = random_tokens(1, 6)
    loss = model(tokens, labels_BS=tokens)
    loss.backward()
    wide = {"A", "D", "dt_bias"}
    expected = {
        key: torch.float32 if key.split(".")[1] in wide or key in ("gated_norm.weight", "rms_norm.weight") else torch.bfloat16
        for key in given
    }
    assert {f"{op}.{name}" for op in ("ssd", "selective_scan") for name in wide} <= given.keys()
    assert given == {key: {dtype} for key, dtype in expected.items()}
    assert loss.dtype == torch.float32
    assert model(tokens).dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    apart = {name.rpartition(".")[2] for name, _, row in model.table_parameters() if row.fp32}
    assert apart == {"A_log", "D", "dt_bias", "norm_weight", "weight"}
    assert len(model.apart()) == 3 + 1 + 3 + 5


def test_bf16_is_near_fp32(context: ParallelContext) -> None:
    """Not only the dtypes: the loss of a bf16 model is that of the fp32 one within bf16's rounding."""
    tokens = random_tokens(4, 32)
    losses = []
    for precision in ("fp32", "bf16"):
        model = build(tiny("Mm*-"), context, precision=precision)
        losses.append(model(tokens, labels_BS=tokens, scale=1 / tokens.numel()).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]


def test_documents_and_cache_do_not_mix(context: ParallelContext) -> None:
    model = random_model(tiny("M"), context, sharded=False)
    cache = model.new_cache(1, 4, torch.float64)
    with pytest.raises(ValueError, match="a cache holds one document a row"):
        model(random_tokens(1, 4), document_start_BS=torch.ones(1, 4, dtype=torch.bool), cache=cache)
