"""SSD as Triton kernels (Mamba-2, arXiv 2405.21060, section 6): chunks in parallel, states between them in one light sweep.

With the letters of `reference`: X_j = dt_j x_j, a_j = dt_j A, cs_i = a_1 + ... + a_i inside a chunk of Q tokens, and for one head
    y_i = sum_{j<=i} exp(cs_i - cs_j) (C_i . B_j) X_j + exp(cs_i) C_i h + D x_i
    h'  = exp(cs_Q) h + sum_j exp(cs_Q - cs_j) X_j B_j^T
Forward:  1. dt and cs, head by head [B, H, S];  2. states: a program carries a tile of one head's state over the chunks in float32
and writes it before each, in the dtype of the matrix products;  3. output: a program takes half a chunk and all heads of a group,
which share C_i . B_j.
Backward: 2. the same sweep in reverse, for the gradient of the state after each chunk;  4. that of B_j . C_i, summed over heads;
5. those of C and B;  3. transposed, that of x;  6. that of dt, with the sums for A, D and dt_bias. No [Q, Q] of a head leaves a
program. All sums have a fixed order: gradients are the same every run.

The tokens of the second half of a chunk see those of the first through C_i . B_j too, but with a decay that is the product of those
to and from the border between them, each at most 1: no exponential and no product a pair of tokens, only scaled rows of x. That
leaves the two blocks on the diagonal, half of a square of Q x Q.

A long sequence of few heads is swept in segments: each from a zero state, then from what the ones before leave. That is also how
ranks share a sequence. Decays are kept as base-2 logarithms; for float32 inputs as the sum of two numbers, since the decay of a
short stretch is a small difference of sums that may be large. `g_` before a name is the gradient of the loss with respect to it.

The loops over chunks and heads say their number of stages themselves: only then does Triton ask ahead for what no matrix product
reads too, decays for example.
"""

import triton
import triton.language as tl

from mamba_kernels.activation.fused import softplus

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_EXPONENT = tl.constexpr(126.0)  # Keeps what a mask sets to zero finite.


@triton.jit
def decays_kernel(
    dt_ptr, bias_ptr, A_ptr, step_ptr, cs_ptr, fine_ptr, S, H, chunks, s_dt_b, s_dt_s,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISE: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """step = softplus(dt + dt_bias) and cs = cumulative sum of step A log2(e) in a chunk, from [B, S, H] to [B, H, S]; and what the
    rounding of cs lost (PRECISE), or else cs - log2(step)."""
    b, c = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    h, t = tl.program_id(1) * BH + tl.arange(0, BH), c * Q + tl.arange(0, Q)
    mask = (t[:, None] < S) & (h[None, :] < H)
    step = tl.load(dt_ptr + b * s_dt_b + t[:, None] * s_dt_s + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.trans(tl.where(mask, step, 0.0))
    A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float64) * LOG2_E
    cs = tl.cumsum(step.to(tl.float64) * A[:, None], axis=1)
    at = (b * H + h[:, None]) * S + t[None, :]
    mask = (t[None, :] < S) & (h[:, None] < H)
    high = cs.to(tl.float32)
    tl.store(step_ptr + at, step, mask=mask)
    tl.store(cs_ptr + at, high, mask=mask)
    fine = high - tl.log2(step)
    if PRECISE:
        fine = (cs - high.to(tl.float64)).to(tl.float32)
    tl.store(fine_ptr + at, fine, mask=mask)


@triton.jit
def _between(cs_i, lo_i, cs_j, lo_j, PRECISE: tl.constexpr):
    """exp(cs_i - cs_j), finite where i < j too."""
    exponent = cs_i - cs_j
    if PRECISE:
        exponent += lo_i - lo_j
    return tl.exp2(tl.minimum(exponent, LARGEST_EXPONENT))


@triton.jit
def _load_cs(cs_ptr, fine_ptr, t, mask, PRECISE: tl.constexpr):
    cs = tl.load(cs_ptr + t, mask=mask, other=0.0)
    lo = cs
    if PRECISE:
        lo = tl.load(fine_ptr + t, mask=mask, other=0.0)
    return cs, lo


@triton.jit
def _load_sources(step_ptr, cs_ptr, fine_ptr, t, mask, PRECISE: tl.constexpr):
    """Of tokens j, what `_weighted` takes: the fewer vectors the better, as each is spread over the columns of a tile."""
    if PRECISE:
        cs, lo = _load_cs(cs_ptr, fine_ptr, t, mask, PRECISE)
        return cs, lo, tl.load(step_ptr + t, mask=mask, other=0.0)
    else:
        source = tl.load(fine_ptr + t, mask=mask, other=0.0)
        return source, source, source


@triton.jit
def _weighted(value, cs_i, lo_i, cs_j, lo_j, step_j, PRECISE: tl.constexpr):
    """value exp(cs_i - cs_j) step_j; zero where the value is, also where i < j and the rest would overflow."""
    value *= _between(cs_i, lo_i, cs_j, lo_j, PRECISE)
    if PRECISE:
        value *= step_j
    return value


@triton.jit
def _rows(ptr, r, begin, stride, mask, columns, limit, EVEN: tl.constexpr, OPERAND: tl.constexpr):
    """The tokens begin + r of a matrix with unit column stride; zero where masked, unless all tiles are whole (EVEN)."""
    at = ptr + begin * stride + (r[:, None] * stride + columns[None, :])
    if EVEN:
        return tl.load(at).to(OPERAND)
    return tl.load(at, mask=mask[:, None] & (columns[None, :] < limit), other=0.0).to(OPERAND)


@triton.jit
def _state(ptr, p, n, P, N, EVEN: tl.constexpr):
    at = ptr + (p[:, None] * N + n[None, :])
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(p[:, None] < P) & (n[None, :] < N), other=0.0)


@triton.jit
def _store_rows(ptr, r, stride, mask, columns, limit, value, EVEN: tl.constexpr):
    at, value = ptr + (r[:, None] * stride + columns[None, :]), value.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=mask[:, None] & (columns[None, :] < limit))


@triton.jit
def _at(ptr, b, s_b, i, s_i):
    """Where head or group i of sequence b begins."""
    return ptr + b * s_b + i.to(tl.int64) * s_i


@triton.jit
def states_kernel(
    v_ptr, w_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, from_ptr, end_ptr, states_ptr, before_ptr, log_decay_ptr, decay_ptr,
    S, H, K, P: tl.constexpr, N: tl.constexpr, chunks, segment, s_v_b, s_v_s: tl.constexpr, s_v_h: tl.constexpr, s_w_b,
    s_w_s: tl.constexpr, s_w_g, s_cs_b, s_doc_b,
    REVERSE: tl.constexpr, HAS_FROM: tl.constexpr, WRITE: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISE: tl.constexpr,
    EVEN: tl.constexpr, Q: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """Sweep a [BP, BN] tile of one head's state over the chunks of a segment: h' = E_Q h + sum_j F_j X_j B_j^T (v = x, w = B), or
    its transpose from the end, g = E_Q g' + sum_i E_i g_y_i C_i^T (v = g_y, w = C). Writes the state that each chunk begins with
    (WRITE), or whose gradient is that of the state after it; and the last one, with the decay over the segment. Several HEADS of
    a group, which then lie side by side in v and have P = BP rows each, share what is read of w."""
    OPERAND: tl.constexpr = v_ptr.dtype.element_ty
    tiles_n, parts = tl.cdiv(N, BN), tl.num_programs(1)
    tiles = tl.cdiv(P, BP) * tiles_n
    tile, head, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles * HEADS, tl.program_id(1)
    b, h, sequences = (head // H).to(tl.int64), head % H, tl.num_programs(0) * HEADS // (tiles * H)
    rows, q = tl.arange(0, HEADS * BP), tl.arange(0, STEP)
    k, p, n = rows // BP, (tile // tiles_n) * BP + rows, (tile % tiles_n) * BN + tl.arange(0, BN)
    in_state = (p[:, None] < HEADS * P) & (n[None, :] < N)
    at_state = p[:, None] * N + n[None, :]
    v_ptr, w_ptr = _at(v_ptr, b, s_v_b, h, s_v_h), _at(w_ptr, b, s_w_b, h // K, s_w_g)
    head = b * s_cs_b + h.to(tl.int64) * S
    ends_at = ((b * parts + part) * H + h) * P * N
    state = tl.zeros((HEADS * BP, BN), dtype=tl.float32)
    if HAS_FROM:
        state = tl.load(from_ptr + ends_at + at_state, mask=in_state, other=0.0).to(tl.float32)
    total = tl.full((HEADS * BP,), 1.0, dtype=tl.float32)
    first = part * segment
    last = tl.minimum(first + segment, chunks)
    for i in tl.range(0, last - first, num_stages=num_stages):
        c = (first + i).to(tl.int64)
        if REVERSE:
            c = (last - 1 - i).to(tl.int64)
        end = tl.minimum(c * Q + Q, S) - 1
        decay = tl.zeros((HEADS * BP,), dtype=tl.float32)
        ends = ()
        for i_head in tl.static_range(HEADS):
            ends += _load_cs(cs_ptr + head, fine_ptr + head, i_head * S + end, end >= 0, PRECISE)
            decay = tl.where(k == i_head, _between(ends[2 * i_head], ends[2 * i_head + 1], 0.0, 0.0, PRECISE), decay)
        document_before, document_end = 0, 0
        if HAS_DOCS:
            document_end = tl.load(doc_ptr + b * s_doc_b + end)
            document_before = tl.load(doc_ptr + b * s_doc_b + c * Q - 1, mask=c > 0, other=0)
            decay = tl.where(document_end == document_before, decay, 0.0)
        at_chunk = ((b * chunks + c) * H + h) * P * N
        if WRITE:
            tl.store(states_ptr + at_chunk + at_state, state.to(OPERAND), mask=in_state)
            if REVERSE:
                before = tl.load(before_ptr + at_chunk + at_state, mask=in_state, other=0.0).to(tl.float32)
                log_decay = tl.sum(tl.reshape(decay * tl.sum(state * before, axis=1), (HEADS, BP)), axis=1)
                at = ((tile * sequences + b) * H + h + tl.arange(0, HEADS)) * chunks + c
                tl.store(log_decay_ptr + at, log_decay)
        state *= decay[:, None]
        total *= decay
        for i_step in tl.static_range(Q // STEP):
            begin = c * Q + i_step * STEP
            t = begin + q
            inside = t < S
            if HAS_DOCS:
                document = tl.load(doc_ptr + b * s_doc_b + t, mask=t < S, other=-1)
                inside = inside & (document == (document_before if REVERSE else document_end))
            scales = tl.zeros((STEP, 1), dtype=tl.float32)
            for i_head in tl.static_range(HEADS):
                if REVERSE:
                    cs, lo = _load_cs(cs_ptr + head, fine_ptr + head, i_head * S + t, t < S, PRECISE)
                    scale = _between(cs, lo, 0.0, 0.0, PRECISE)
                else:
                    cs, lo, step = _load_sources(step_ptr + head, cs_ptr + head, fine_ptr + head, i_head * S + t, t < S, PRECISE)
                    scale = _weighted(1.0, ends[2 * i_head], ends[2 * i_head + 1], cs, lo, step, PRECISE)
                scales = tl.where(k[None, :] == i_head, tl.where(inside, scale, 0.0)[:, None], scales)
            v = _rows(v_ptr, q, begin, s_v_s, t < S, p, HEADS * P, EVEN, OPERAND).to(tl.float32)
            w = _rows(w_ptr, q, begin, s_w_s, t < S, n, N, EVEN, OPERAND)
            state = tl.dot(tl.trans((v * scales).to(OPERAND)), w, state, input_precision="ieee")
    tl.store(end_ptr + ends_at + at_state, state, mask=in_state)
    if tile == 0:
        tl.store(decay_ptr + (b * parts + part) * H + h + k, total, mask=rows % BP == 0)


@triton.jit
def carry_kernel(
    from_ptr, end_ptr, decay_ptr, start_ptr, final_ptr, H, PN, parts,
    REVERSE: tl.constexpr, HAS_FROM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state that each segment begins with, from what each gives from a zero state, and the one after all."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_FROM:
        state = tl.load(from_ptr + (b * H + h) * PN + e, mask=e < PN, other=0.0).to(tl.float32)
    for i in range(parts):
        part = i
        if REVERSE:
            part = parts - 1 - i
        at = (b * parts + part) * H + h
        tl.store(start_ptr + at * PN + e, state, mask=e < PN)
        state = state * tl.load(decay_ptr + at) + tl.load(end_ptr + at * PN + e, mask=e < PN, other=0.0)
    tl.store(final_ptr + (b * H + h) * PN + e, state, mask=e < PN)


@triton.jit
def _output_rows(
    v_ptr, u_ptr, w_ptr, D_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, states_ptr, y_ptr, b, c, g,
    S, H, G, K, P, N, chunks, heads, s_v_b, s_v_s, s_v_h, s_u_b, s_u_s, s_u_g, s_w_b, s_w_s, s_w_g, s_y_b, s_y_s, s_y_h,
    s_cs_b, s_doc_b, ACROSS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr,
    Q: tl.constexpr, PADDED_P: tl.constexpr, BP: tl.constexpr, PADDED_N: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """One half of a chunk, that which sees the tokens of the other half ACROSS the border or that which does not."""
    OPERAND: tl.constexpr = v_ptr.dtype.element_ty
    R: tl.constexpr = Q // 2
    FIRST: tl.constexpr = ACROSS == REVERSE
    r, n, begin, begin_o = tl.arange(0, R), tl.arange(0, PADDED_N), c * Q + (0 if FIRST else R), c * Q + (R if FIRST else 0)
    t, o, end = begin + r, begin_o + r, tl.minimum(c * Q + Q, S) - 1
    u_ptr, w_ptr = _at(u_ptr, b, s_u_b, g, s_u_g), _at(w_ptr, b, s_w_b, g, s_w_g)
    u = _rows(u_ptr, r, begin, s_u_s, t < S, n, N, EVEN, OPERAND)
    w = _rows(w_ptr, r, begin, s_w_s, t < S, n, N, EVEN, OPERAND)
    sees = r[:, None] <= r[None, :] if REVERSE else r[:, None] >= r[None, :]
    pairs = tl.where(sees, tl.dot(u, tl.trans(w), input_precision="ieee"), 0.0)
    if ACROSS:
        w_other = _rows(w_ptr, r, begin_o, s_w_s, o < S, n, N, EVEN, OPERAND)
        pairs_across = tl.dot(u, tl.trans(w_other), input_precision="ieee")
    linked = t < S
    if HAS_DOCS:
        doc = tl.load(doc_ptr + b * s_doc_b + t, mask=t < S, other=-2)
        pairs = tl.where(doc[:, None] == doc[None, :], pairs, 0.0)
        if REVERSE:
            linked = doc == tl.load(doc_ptr + b * s_doc_b + end, mask=end >= 0, other=-1)
        else:
            linked = doc == tl.load(doc_ptr + b * s_doc_b + c * Q - 1, mask=c > 0, other=0)
        if ACROSS:
            doc_other = tl.load(doc_ptr + b * s_doc_b + o, mask=o < S, other=-1)
            pairs_across = tl.where(doc[:, None] == doc_other[None, :], pairs_across, 0.0)
    if ACROSS:
        pairs_across = pairs_across.to(OPERAND)
    for k in tl.range(0, heads, num_stages=num_stages):
        h = g * K + tl.program_id(2) * heads + k
        head = b * s_cs_b + h.to(tl.int64) * S
        cs, lo = _load_cs(cs_ptr + head, fine_ptr + head, t, t < S, PRECISE)
        if REVERSE:
            step = tl.load(step_ptr + head + t, mask=t < S, other=0.0)
            cs_end, lo_end = _load_cs(cs_ptr + head, fine_ptr + head, end, end >= 0, PRECISE)
            M = (pairs * _between(cs[None, :], lo[None, :], cs[:, None], lo[:, None], PRECISE)).to(OPERAND)
        else:
            cs_j, lo_j, step_j = _load_sources(step_ptr + head, cs_ptr + head, fine_ptr + head, t, t < S, PRECISE)
            M = _weighted(pairs, cs[:, None], lo[:, None], cs_j[None, :], lo_j[None, :], step_j[None, :], PRECISE).to(OPERAND)
        if ACROSS:
            border = tl.minimum(c * Q + R, S) - 1
            cs_border, lo_border = _load_cs(cs_ptr + head, fine_ptr + head, border, border >= 0, PRECISE)
            if REVERSE:
                cs_other, lo_other = _load_cs(cs_ptr + head, fine_ptr + head, o, o < S, PRECISE)
                decay = tl.where(t < S, _between(cs_border, lo_border, cs, lo, PRECISE), 0.0)
                decay_state = tl.where(linked, _between(cs_end, lo_end, cs_border, lo_border, PRECISE), 0.0)
                weight = tl.where(o < S, _between(cs_other, lo_other, cs_border, lo_border, PRECISE), 0.0)
            else:
                decay = _between(cs, lo, cs_border, lo_border, PRECISE)
                decay_state = tl.where(linked, _between(cs_border, lo_border, 0.0, 0.0, PRECISE), 0.0)
                cs_o, lo_o, step_o = _load_sources(step_ptr + head, cs_ptr + head, fine_ptr + head, o, o < S, PRECISE)
                weight = _weighted(1.0, cs_border, lo_border, cs_o, lo_o, step_o, PRECISE)
        elif REVERSE:
            decay_state = tl.where(linked, _between(cs_end, lo_end, cs, lo, PRECISE), 0.0)
        else:
            decay_state = tl.where(linked, _between(cs, lo, 0.0, 0.0, PRECISE), 0.0)
        v_head, y_head = _at(v_ptr, b, s_v_b, h, s_v_h), _at(y_ptr, b, s_y_b, h, s_y_h) + begin * s_y_s
        for block_p in tl.static_range(PADDED_P // BP):
            p = block_p * BP + tl.arange(0, BP)
            state = _state(states_ptr + ((b * chunks + c) * H + h) * P * N, p, n, P, N, EVEN)
            v = _rows(v_head, r, begin, s_v_s, t < S, p, P, EVEN, OPERAND)
            y = tl.dot(u, tl.trans(state), input_precision="ieee") * decay_state[:, None]
            if ACROSS:
                v_other = _rows(v_head, r, begin_o, s_v_s, o < S, p, P, EVEN, OPERAND).to(tl.float32)
                y = tl.dot(pairs_across, (v_other * weight[:, None]).to(OPERAND), y, input_precision="ieee")
                y *= decay[:, None]
            y = tl.dot(M, v, y, input_precision="ieee")
            if REVERSE:
                y *= step[:, None]
            if HAS_D:
                y += v.to(tl.float32) * tl.load(D_ptr + h).to(tl.float32)
            _store_rows(y_head, r, s_y_s, t < S, p, P, y, EVEN)


@triton.jit
def output_kernel(
    v_ptr, u_ptr, w_ptr, D_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, states_ptr, y_ptr,
    S, H, G, K, P: tl.constexpr, N: tl.constexpr, chunks, heads, s_v_b, s_v_s: tl.constexpr, s_v_h: tl.constexpr, s_u_b,
    s_u_s: tl.constexpr, s_u_g, s_w_b, s_w_s: tl.constexpr, s_w_g, s_y_b, s_y_s: tl.constexpr, s_y_h: tl.constexpr,
    s_cs_b, s_doc_b, REVERSE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr,
    Q: tl.constexpr, PADDED_P: tl.constexpr, BP: tl.constexpr, PADDED_N: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """y of half a chunk for some heads of a group, from v = x, u = C, w = B and the states before chunks; or its transpose, the
    gradient of x from v = g_y, u = B, w = C and the gradients of the states after chunks."""
    c, b, g = (tl.program_id(0) // 2).to(tl.int64), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    if (tl.program_id(0) % 2 == 0) == REVERSE:
        _output_rows(
            v_ptr, u_ptr, w_ptr, D_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, states_ptr, y_ptr, b, c, g,
            S, H, G, K, P, N, chunks, heads, s_v_b, s_v_s, s_v_h, s_u_b, s_u_s, s_u_g, s_w_b, s_w_s, s_w_g, s_y_b, s_y_s, s_y_h,
            s_cs_b, s_doc_b, True, REVERSE, HAS_D, HAS_DOCS, PRECISE, EVEN, Q, PADDED_P, BP, PADDED_N, num_stages,
        )  # fmt: skip
    else:
        _output_rows(
            v_ptr, u_ptr, w_ptr, D_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, states_ptr, y_ptr, b, c, g,
            S, H, G, K, P, N, chunks, heads, s_v_b, s_v_s, s_v_h, s_u_b, s_u_s, s_u_g, s_w_b, s_w_s, s_w_g, s_y_b, s_y_s, s_y_h,
            s_cs_b, s_doc_b, False, REVERSE, HAS_D, HAS_DOCS, PRECISE, EVEN, Q, PADDED_P, BP, PADDED_N, num_stages,
        )  # fmt: skip


@triton.jit
def _pairs_of_heads(
    BC, visible, x_ptr, g_y_ptr, step_ptr, cs_ptr, fine_ptr, g_inside_ptr, g_row_ptr, g_column_ptr, g_after_ptr, g_D_ptr,
    b, c, g, begin_j, begin_i, S, H, K, P, heads, s_x_b, s_x_s, s_x_h, s_gy_b, s_gy_s, s_gy_h, s_cs_b, ACROSS: tl.constexpr,
    HAS_D: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, PADDED_P: tl.constexpr, BP: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """The sum over heads of the gradients of B_j . C_i, for the tokens j from `begin_j` (rows) and i from `begin_i`: of the same
    half of a chunk, or the former of the first and the latter of the second, ACROSS the border."""
    OPERAND: tl.constexpr = x_ptr.dtype.element_ty
    r = tl.arange(0, R)
    j, i = begin_j + r, begin_i + r
    g_BC, not_before = tl.zeros((R, R), dtype=tl.float32), tl.where(r[:, None] >= r[None, :], 1.0, 0.0).to(OPERAND)
    for k in tl.range(0, heads, num_stages=num_stages):
        h = g * K + tl.program_id(2) * heads + k
        head, at = b * s_cs_b + h.to(tl.int64) * S, (b * H + h) * S
        x_head, g_y_head = _at(x_ptr, b, s_x_b, h, s_x_h), _at(g_y_ptr, b, s_gy_b, h, s_gy_h)
        g_M = tl.zeros((R, R), dtype=tl.float32)
        for block_p in tl.static_range(PADDED_P // BP):
            p = block_p * BP + tl.arange(0, BP)
            x = _rows(x_head, r, begin_j, s_x_s, j < S, p, P, EVEN, OPERAND)
            g_y = _rows(g_y_head, r, begin_i, s_gy_s, i < S, p, P, EVEN, OPERAND)
            g_M = tl.dot(x, tl.trans(g_y), g_M, input_precision="ieee")
        cs_j, lo_j = _load_cs(cs_ptr + head, fine_ptr + head, j, j < S, PRECISE)
        cs_i, lo_i = _load_cs(cs_ptr + head, fine_ptr + head, i, i < S, PRECISE)
        step = tl.load(step_ptr + head + j, mask=j < S, other=0.0)
        if ACROSS:
            border = tl.minimum(begin_i, S) - 1
            cs_border, lo_border = _load_cs(cs_ptr + head, fine_ptr + head, border, border >= 0, PRECISE)
            decay_j = _between(cs_border, lo_border, cs_j, lo_j, PRECISE)
            decay_i = tl.where(i < S, _between(cs_i, lo_i, cs_border, lo_border, PRECISE), 0.0)
            g_BC += g_M * ((decay_j * step)[:, None] * decay_i[None, :])
            g_M *= BC
            tl.store(g_after_ptr + at + j, decay_j * tl.sum(g_M * decay_i[None, :], axis=1), mask=j < S)
            tl.store(g_row_ptr + at + i, decay_i * tl.sum(g_M * (decay_j * step)[:, None], axis=0), mask=i < S)
        else:
            if HAS_D:
                tl.store(g_D_ptr + at + j, tl.sum(tl.where(r[:, None] == r[None, :], g_M, 0.0), axis=1), mask=j < S)
            exponent = cs_i[None, :] - cs_j[:, None]
            if PRECISE:
                exponent += lo_i[None, :] - lo_j[:, None]
            g_M *= tl.exp2(tl.where(visible, exponent, float("-inf")))
            g_BC += g_M * step[:, None]
            g_M *= BC
            tl.store(g_column_ptr + at + j, tl.sum(g_M, axis=1), mask=j < S)
            # a_k is in L_ij for j < k <= i. Summed as such: in the difference of row sums and column sums, small gradients
            # would be rounding errors, which a large dt makes large.
            g_inside = tl.dot((g_M * step[:, None]).to(OPERAND), not_before, input_precision="ieee")
            g_inside = tl.sum(tl.where(r[:, None] < r[None, :], g_inside, 0.0), axis=0)
            tl.store(g_inside_ptr + at + j, g_inside, mask=j < S)
    return g_BC


@triton.jit
def pair_gradient_kernel(
    x_ptr, B_ptr, C_ptr, g_y_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, g_BC_ptr, g_inside_ptr, g_row_ptr, g_column_ptr, g_after_ptr,
    g_D_ptr, S, H, G, K, P, N, chunks, heads, s_x_b, s_x_s, s_x_h, s_B_b, s_B_s, s_B_g, s_C_b, s_C_s, s_C_g, s_gy_b, s_gy_s, s_gy_h,
    s_cs_b, s_doc_b,
    HAS_D: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr,
    Q: tl.constexpr, PADDED_P: tl.constexpr, BP: tl.constexpr, PADDED_N: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """The gradients of B_j . C_i for some heads of a group, summed over them, in one of the three blocks of a chunk with j <= i: on
    the diagonal, those of its halves; off it, that of j in the first half and i in the second. For each head besides: on the
    diagonal that of D, that of dt_j through X_j, and that of a_k through the decays L_ij inside the half; off it that of dt_j,
    which times dt_j is also that of the logarithm of the decay from token j to the border, and that of the one from the border to
    token i."""
    OPERAND: tl.constexpr = x_ptr.dtype.element_ty
    R: tl.constexpr = Q // 2
    c, block = (tl.program_id(0) // 3).to(tl.int64), tl.program_id(0) % 3
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    r, n = tl.arange(0, R), tl.arange(0, PADDED_N)
    row, column = tl.where(block == 1, R, 0), tl.where(block == 0, 0, R)
    begin_j, begin_i = c * Q + row, c * Q + column
    j, i = begin_j + r, begin_i + r
    B = _rows(_at(B_ptr, b, s_B_b, g, s_B_g), r, begin_j, s_B_s, j < S, n, N, EVEN, OPERAND)
    C = _rows(_at(C_ptr, b, s_C_b, g, s_C_g), r, begin_i, s_C_s, i < S, n, N, EVEN, OPERAND)
    visible = (j[:, None] <= i[None, :]) & (i[None, :] < S)
    if HAS_DOCS:
        doc_j = tl.load(doc_ptr + b * s_doc_b + j, mask=j < S, other=-1)
        doc_i = tl.load(doc_ptr + b * s_doc_b + i, mask=i < S, other=-2)
        visible = visible & (doc_j[:, None] == doc_i[None, :])
    BC = tl.where(visible, tl.dot(B, tl.trans(C), input_precision="ieee"), 0.0)
    if block < 2:
        g_BC = _pairs_of_heads(
            BC, visible, x_ptr, g_y_ptr, step_ptr, cs_ptr, fine_ptr, g_inside_ptr, g_row_ptr, g_column_ptr, g_after_ptr, g_D_ptr,
            b, c, g, begin_j, begin_i, S, H, K, P, heads, s_x_b, s_x_s, s_x_h, s_gy_b, s_gy_s, s_gy_h, s_cs_b, False,
            HAS_D, PRECISE, EVEN, R, PADDED_P, BP, num_stages,
        )  # fmt: skip
    else:
        g_BC = _pairs_of_heads(
            BC, visible, x_ptr, g_y_ptr, step_ptr, cs_ptr, fine_ptr, g_inside_ptr, g_row_ptr, g_column_ptr, g_after_ptr, g_D_ptr,
            b, c, g, begin_j, begin_i, S, H, K, P, heads, s_x_b, s_x_s, s_x_h, s_gy_b, s_gy_s, s_gy_h, s_cs_b, True,
            HAS_D, PRECISE, EVEN, R, PADDED_P, BP, num_stages,
        )  # fmt: skip
    g_BC = tl.where(visible, g_BC, 0.0)
    g_BC_ptr += (((b * chunks + c) * G + g) * tl.num_programs(2) + tl.program_id(2)) * Q * Q + row * Q + column
    tl.store(g_BC_ptr + (r[:, None] * Q + r[None, :]), g_BC.to(OPERAND))


@triton.jit
def group_gradient_kernel(
    v_ptr, u_ptr, w_ptr, step_ptr, cs_ptr, fine_ptr, doc_ptr, states_ptr, g_BC_ptr, g_ptr, g_edge_ptr,
    S, H, G, K, P: tl.constexpr, N: tl.constexpr, chunks, heads, s_v_b, s_v_s: tl.constexpr, s_v_h: tl.constexpr, s_u_b,
    s_u_s: tl.constexpr, s_u_g, s_w_b, s_w_s: tl.constexpr, s_w_g, s_g_k, s_g_b, s_g_s: tl.constexpr, s_g_g,
    s_cs_b, s_doc_b,
    OF_B: tl.constexpr, HAS_DOCS: tl.constexpr, PRECISE: tl.constexpr, EVEN: tl.constexpr,
    Q: tl.constexpr, ROWS: tl.constexpr, PADDED_P: tl.constexpr, BP: tl.constexpr, PADDED_N: tl.constexpr,
    num_stages: tl.constexpr,
):  # fmt: skip
    """The gradient of u = C (w = B, v = g_y, states: those before each chunk) or of u = B (w = C, v = x, states: the gradients of
    those after) for some rows of a chunk and some heads of a group. For each head besides, that of the logarithm of E_i; or that of
    dt_j through X_j and F_j, which times dt_j is also that of the logarithm of F_j."""
    OPERAND: tl.constexpr = v_ptr.dtype.element_ty
    R: tl.constexpr = Q // 2
    blocks: tl.constexpr = Q // ROWS
    c, first = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * ROWS
    b, g, split = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, tl.program_id(2)
    r, q, n = tl.arange(0, ROWS), tl.arange(0, Q), tl.arange(0, PADDED_N)
    begin, end = c * Q + first, tl.minimum(c * Q + Q, S) - 1
    t = begin + r
    u = _rows(_at(u_ptr, b, s_u_b, g, s_u_g), r, begin, s_u_s, t < S, n, N, EVEN, OPERAND)
    inside = t < S
    if HAS_DOCS:
        doc = tl.load(doc_ptr + b * s_doc_b + t, mask=t < S, other=-2)
        if OF_B:
            inside = doc == tl.load(doc_ptr + b * s_doc_b + end)
        else:
            inside = doc == tl.load(doc_ptr + b * s_doc_b + c * Q - 1, mask=c > 0, other=0)
    gradient = tl.zeros((ROWS, PADDED_N), dtype=tl.float32)
    for k in tl.range(0, heads, num_stages=num_stages):
        h = g * K + split * heads + k
        head = b * s_cs_b + h.to(tl.int64) * S
        cs, lo = _load_cs(cs_ptr + head, fine_ptr + head, t, t < S, PRECISE)
        if OF_B:
            cs_end, lo_end = _load_cs(cs_ptr + head, fine_ptr + head, end, end >= 0, PRECISE)
            decay = tl.where(inside, _between(cs_end, lo_end, cs, lo, PRECISE), 0.0)
            weight = decay * tl.load(step_ptr + head + t, mask=t < S, other=0.0)
        else:
            decay = tl.where(inside, _between(cs, lo, 0.0, 0.0, PRECISE), 0.0)
            weight = decay
        g_edge = tl.zeros((ROWS,), dtype=tl.float32)
        for block_p in tl.static_range(PADDED_P // BP):
            p = block_p * BP + tl.arange(0, BP)
            state = _state(states_ptr + ((b * chunks + c) * H + h) * P * N, p, n, P, N, EVEN)
            v = _rows(_at(v_ptr, b, s_v_b, h, s_v_h), r, begin, s_v_s, t < S, p, P, EVEN, OPERAND).to(tl.float32)
            g_edge += tl.sum(tl.dot(u, tl.trans(state), input_precision="ieee") * v, axis=1)
            gradient = tl.dot((v * weight[:, None]).to(OPERAND), state, gradient, input_precision="ieee")
        tl.store(g_edge_ptr + (b * H + h) * S + t, g_edge * decay, mask=t < S)
    # Of B_j . C_i only the blocks of R x R with j <= i were written.
    tile = g_BC_ptr + (((b * chunks + c) * G + g) * tl.num_programs(2) + split) * Q * Q
    row, column = (first + r)[:, None], q[None, :]
    if OF_B:
        g_BC = tl.load(tile + (row * Q + column), mask=column // R >= row // R, other=0.0)
    else:
        g_BC = tl.load(tile + (column * Q + row), mask=column // R <= row // R, other=0.0)
    w = _rows(_at(w_ptr, b, s_w_b, g, s_w_g), q, c * Q, s_w_s, c * Q + q < S, n, N, EVEN, OPERAND)
    gradient = tl.dot(g_BC, w, gradient, input_precision="ieee")
    g_ptr += split.to(tl.int64) * s_g_k + b * s_g_b + begin * s_g_s + g.to(tl.int64) * s_g_g
    _store_rows(g_ptr, r, s_g_s, t < S, n, N, gradient, EVEN)


@triton.jit
def dt_gradient_kernel(
    dt_ptr, bias_ptr, A_ptr, step_ptr, g_start_ptr, g_inside_ptr, g_row_ptr, g_column_ptr, g_end_ptr, g_after_ptr, g_D_ptr,
    log_decay_ptr, g_dt_ptr, sums_ptr, S, H, chunks, tiles, s_tile, s_dt_b, s_dt_s, s_gdt_b, s_gdt_s, s_cs_b, s_sums,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The gradient of dt: a_k is in L_ij for j < k <= i, in E_i for k <= i, in F_j for j < k, and in the chunk's decay. The chunk's
    sums for the gradients of A, dt_bias and D go to sums [3, B * chunks, H]."""
    R: tl.constexpr = Q // 2
    b, c = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    h, q = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, Q)
    t = c * Q + q
    mask = (h[:, None] < H) & (t[None, :] < S)
    at = (b * H + h[:, None]) * S + t[None, :]
    g_a = tl.cumsum(tl.load(g_start_ptr + at, mask=mask, other=0.0), axis=1, reverse=True)
    at_step = step_ptr + b * s_cs_b + h[:, None].to(tl.int64) * S + t[None, :]
    step, after_first = tl.load(at_step, mask=mask, other=0.0), mask & (q[None, :] > 0)
    step_before = tl.load(at_step - 1, mask=after_first, other=0.0)
    g_a += tl.cumsum(tl.load(g_end_ptr + at - 1, mask=after_first, other=0.0) * step_before, axis=1)
    g_a += tl.load(g_inside_ptr + at, mask=mask, other=0.0)
    to_row = tl.load(g_row_ptr + at, mask=mask & (q[None, :] >= R), other=0.0)
    to_after = tl.load(g_after_ptr + at - 1, mask=after_first & (q[None, :] < R), other=0.0) * step_before
    halves = tl.cumsum(tl.reshape(to_row, (BH, 2, R)), axis=2, reverse=True) + tl.cumsum(tl.reshape(to_after, (BH, 2, R)), axis=2)
    g_a += tl.reshape(halves, (BH, Q))
    for tile in range(tiles):
        g_a += tl.load(log_decay_ptr + tile * s_tile + (b * H + h) * chunks + c, mask=h < H, other=0.0)[:, None]
    A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    g_dt = g_a * A[:, None] + tl.load(g_column_ptr + at, mask=mask, other=0.0) + tl.load(g_end_ptr + at, mask=mask, other=0.0)
    g_dt += tl.load(g_after_ptr + at, mask=mask & (q[None, :] < R), other=0.0)
    if SOFTPLUS:
        raw = tl.load(dt_ptr + b * s_dt_b + t[None, :] * s_dt_s + h[:, None], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
        g_dt *= tl.sigmoid(raw)
    g_dt = tl.where(mask, g_dt, 0.0)
    tl.store(g_dt_ptr + b * s_gdt_b + t[None, :] * s_gdt_s + h[:, None], g_dt.to(g_dt_ptr.dtype.element_ty), mask=mask)
    at_sums = tl.program_id(0).to(tl.int64) * H + h
    tl.store(sums_ptr + at_sums, tl.sum(tl.where(mask, g_a * step, 0.0), axis=1), mask=h < H)
    tl.store(sums_ptr + s_sums + at_sums, tl.sum(g_dt, axis=1), mask=h < H)
    if HAS_D:
        tl.store(sums_ptr + 2 * s_sums + at_sums, tl.sum(tl.load(g_D_ptr + at, mask=mask, other=0.0), axis=1), mask=h < H)
