#!/usr/bin/env bash
# transformers 5.24.0: pad_token_id = eos_token_id in config.json makes some model classes train no embedding of eos, and others do.
#
# Expected: pad_token_id says what fills short rows of a batch, and those positions are masked. "pad = eos" is the usual advice for
#     a tokenizer without a pad token, so the token that ends every document should be learnt as any other.
# Seen: LlamaForCausalLM, MistralForCausalLM, NemotronForCausalLM and BambaForCausalLM give the id to torch.nn.Embedding as
#     padding_idx: in a new model the row of eos is zero, and its gradient is zero for ever. GPTNeoX, Mamba, Mamba2, FalconMamba and
#     NemotronH ignore it, and train the row. No warning from either kind.
# Why it matters: documents that follow each other in one row are told apart by that token alone. A model exported with pad = eos in
#     config.json loads and generates well, since the row is loaded; trained on, in four of these nine classes, it keeps it as it is;
#     trained from the start, the token that begins each document is the zero vector.
# Way out: leave pad_token_id out of config.json (null), and give it in generation_config.json and the tokenizer only.
#
# Needs python3 (3.10 or newer) with pip and the network. Exits 0 if all is as stated, 1 if something changed, 2 if nothing could be
# installed.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 || exit 2
env/bin/pip install -q transformers==5.24.0 numpy==2.4.3 || exit 2

cat > check.py <<'END'
import sys

import torch
import transformers

EOS = 2
SIZES = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, bos_token_id=EOS, eos_token_id=EOS, tie_word_embeddings=False)
HEADS = dict(num_attention_heads=2, num_key_value_heads=2)
MLP = dict(intermediate_size=32)
BAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_expand=2, attn_layer_indices=[1])
NEMOTRON_H = dict(hybrid_override_pattern="M*", mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=4, n_groups=1)
CLASSES = {
    "Llama": HEADS | MLP, "Mistral": HEADS | MLP, "Nemotron": HEADS | MLP, "Bamba": HEADS | MLP | BAMBA,
    "GPTNeoX": MLP | dict(num_attention_heads=2), "Mamba": dict(state_size=4), "FalconMamba": dict(state_size=4),
    "Mamba2": dict(state_size=4, num_heads=4, head_dim=8, n_groups=1), "NemotronH": HEADS | MLP | NEMOTRON_H,
}
FROZEN = {"Llama", "Mistral", "Nemotron", "Bamba"}

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
found = set()
for name, settings in CLASSES.items():
    config, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    row = {}
    for pad in (None, EOS):
        model = model_class(config(**SIZES, **settings, pad_token_id=pad))
        ids = torch.tensor([[EOS, 5, 6, 7, EOS, 8, 9, 10]])
        model(input_ids=ids, labels=ids).loss.backward()
        embedding = model.get_input_embeddings().weight
        row[pad] = embedding[EOS].abs().max().item(), embedding.grad[EOS].abs().max().item()
    print(f"{name:12} no pad: weight {row[None][0]:.3f}, gradient {row[None][1]:.3f}   pad = eos: weight {row[EOS][0]:.3f}, "
          f"gradient {row[EOS][1]:.3f}")
    if row[EOS] == (0.0, 0.0) and min(row[None]) > 0:
        found.add(name)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: eos is not trained by {', '.join(sorted(found))}")
sys.exit(found != FROZEN)
END
env/bin/python -W ignore check.py
