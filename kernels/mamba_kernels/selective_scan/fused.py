"""The kernels of the selective scan (S6): channels over the lanes of a warp, states in its registers, chunks of time side by side.

A program is one warp: BLOCK channels, two a lane, and a part of their states, COLUMNS of the N, so that the sum over those is one
inside a thread, and nothing waits for another warp. Where sequences, channels and parts are too few to fill the GPU, a sequence is
cut into chunks besides.
Forward:  1. dt after its bias and softplus, and A, B and C, in float32 and as the others want them;  2. the state that each chunk
leaves of a zero one;  3. the state before each chunk;  4. what each part has in y, and the state before each segment of tokens,
kept for the backward;  5. the sum over parts.  With one chunk 2. and 3. are not needed, with one part 5. is not.
Backward: 1. again;  2. and 3. in reverse, for the gradient of the state after each chunk;  4. segment by segment from the last:
first the states before every STEPS tokens, into scratch memory; then for those tokens, one state dimension after the other, the
states once more, in registers, and the adjoint recurrence backwards through them;  5. from sums over states of each part, the
gradients of x and dt;  6. those of B and C from the shares of blocks of channels, those of A, D and dt_bias from those of chunks
and segments. No tensor of [S, E, N] exists. Every sum has a fixed order: gradients are the same every run.

The gradients of B and C are sums over channels, which are spread over lanes. A product with a matrix of ones sums them on the
tensor cores; for 16-bit inputs its terms, sums of two channels, are rounded to the 11 bits those take.

Tensors between kernels are in blocks, [..., K, N, BLOCK] for the K blocks of channels, zero where channels or state dimensions are
padded. Decays are powers of two: A is kept times log2(e). `g_` before a name is the gradient of the loss with respect to it.
"""

import triton
import triton.language as tl

from mamba_kernels.activation.fused import softplus

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = tl.constexpr(64)  # Channels of a program: two a lane.
COLUMNS = tl.constexpr(16)  # State dimensions of a program: as many as the smallest matrix product has columns.
STEPS = tl.constexpr(8)  # Tokens whose states, decays and gradients the adjoint recurrence has in registers.


@triton.jit
def _stack(tensors, COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """COUNT of [ROWS, WIDTH] as [ROWS, WIDTH, COUNT]."""
    if COUNT == 1:
        return tl.reshape(tensors[0], [ROWS, WIDTH, 1])
    else:
        even = ()
        odd = ()
        for i in tl.static_range(COUNT // 2):
            even += (tensors[2 * i],)
            odd += (tensors[2 * i + 1],)
        pair = tl.join(_stack(even, COUNT // 2, ROWS, WIDTH), _stack(odd, COUNT // 2, ROWS, WIDTH))
        return tl.reshape(pair, [ROWS, WIDTH, COUNT])


@triton.jit
def _unstack(x, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, COUNT] as COUNT of [ROWS, 1]."""
    if COUNT == 1:
        return (x,)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, COUNT // 2, 2]))
        evens = _unstack(even, COUNT // 2, ROWS)
        odds = _unstack(odd, COUNT // 2, ROWS)
        columns = ()
        for i in tl.static_range(COUNT // 2):
            columns += (evens[i], odds[i])
        return columns


@triton.jit
def _reversed(tensors):
    """STEPS tensors in reverse order."""
    backwards = ()
    for i in tl.static_range(STEPS):
        backwards += (tensors[STEPS - 1 - i],)
    return backwards


@triton.jit
def _load_rows(base, first, limit, stride, lane, count, GROUP: tl.constexpr):
    """GROUP rows from `first`, zero from `limit` and in lanes from `count`, as float32 [1, BLOCK] each."""
    rows = ()
    at = base + first.to(tl.int64) * stride
    for i in tl.static_range(GROUP):
        row = tl.load(at + i * stride + lane, mask=lane < tl.where(first + i < limit, count, 0), other=0.0).to(tl.float32)
        rows += (row[None, :],)
    return rows


@triton.jit
def _load_resets(start_ptr, batch, first, limit, s_start_b, s_start_s, STARTS: tl.constexpr, GROUP: tl.constexpr):
    """What to add to the exponents of GROUP tokens: minus infinity where a document starts."""
    resets = ()
    for i in tl.static_range(GROUP):
        if STARTS:
            at = start_ptr + batch * s_start_b + (first + i).to(tl.int64) * s_start_s
            starts = tl.load(at, mask=first + i < limit, other=0) != 0
            resets += (tl.where(starts, float("-inf"), 0.0),)
        else:
            resets += (0.0,)
    return resets


@triton.jit
def _decay(step, A, reset, STARTS: tl.constexpr):
    """exp(dt A), for A in base 2; 0 at a reset whatever the sign of A."""
    if STARTS:
        return tl.exp2(step * A + reset)
    else:
        return tl.exp2(step * A)


@triton.jit
def _load_vectors(base, first, NT: tl.constexpr, GROUP: tl.constexpr):
    """GROUP rows of B or C from `first`, of which `base` has the addresses in row 0, as [COLUMNS, 1] each."""
    vectors = ()
    at = base + first.to(tl.int64) * NT
    for i in tl.static_range(GROUP):
        vectors += (tl.load(at + i * NT)[:, None],)
    return vectors


@triton.jit
def prepare_kernel(
    dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, step_ptr, A_out_ptr, rows_ptr, columns_ptr, S, E, N, length,
    s_dt_b, s_dt_s, s_A_e, s_A_n, s_B_b, s_B_s, s_C_b, s_C_s,
    BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BACKWARD: tl.constexpr, SEGMENT: tl.constexpr, NT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a segment: dt of one block of channels, or B and C, by token and, for the backward, by state dimension too."""
    segment, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, batches = tl.num_programs(1) - 1, tl.num_programs(2)
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, length)
    n = tl.arange(0, WIDTH)  # A power of two, which NT need not be.
    if block < blocks:
        channel, lane = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
        out_ptr = step_ptr + (batch * blocks + block) * length * BLOCK
        for first in range(begin, end, ROWS):
            t = first + tl.arange(0, ROWS)[:, None]
            inside = (t < S) & (channel[None, :] < E)
            v = tl.load(dt_ptr + batch * s_dt_b + t.to(tl.int64) * s_dt_s + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                v += tl.load(bias_ptr + channel, mask=channel < E, other=0.0).to(tl.float32)[None, :]
            if SOFTPLUS:
                v = softplus(v)
            tl.store(out_ptr + t.to(tl.int64) * BLOCK + lane[None, :], tl.where(inside, v, 0.0), mask=t < end)
        if (segment == 0) & (batch == 0):
            inside = (channel[None, :] < E) & (n[:, None] < N)
            A = tl.load(A_ptr + channel[None, :].to(tl.int64) * s_A_e + n[:, None] * s_A_n, mask=inside, other=0.0)
            tl.store(A_out_ptr + (block * NT + n[:, None]) * BLOCK + lane[None, :], A.to(tl.float32) * LOG2_E, mask=n[:, None] < NT)
    else:
        for first in range(begin, end, STEPS):
            t = first + tl.arange(0, STEPS)[:, None]
            inside = (t < S) & (n[None, :] < N)
            B = tl.load(B_ptr + batch * s_B_b + t.to(tl.int64) * s_B_s + n[None, :], mask=inside, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + batch * s_C_b + t.to(tl.int64) * s_C_s + n[None, :], mask=inside, other=0.0).to(tl.float32)
            at, inside = t.to(tl.int64) * NT + n[None, :], n[None, :] < NT
            tl.store(rows_ptr + batch * length * NT + at, B, mask=inside)
            tl.store(rows_ptr + (batches + batch) * length * NT + at, C, mask=inside)
            if BACKWARD:
                at = columns_ptr + (batch * length + first) * (2 * NT) + n[None, :] * (2 * STEPS) + (t - first)
                tl.store(at, B, mask=inside)
                tl.store(at + STEPS, C, mask=inside)


@triton.jit
def chunk_kernel(
    input_ptr, step_ptr, start_ptr, A_ptr, rows_ptr, state_ptr, sum_ptr, S, E, length, chunk_tokens, first_chunk, chunks,
    s_in_b, s_in_s, s_start_b, s_start_s,
    REVERSE: tl.constexpr, STARTS: tl.constexpr, NT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state that a chunk leaves of a zero one, from x and B; or, from g_y and C, the gradient of the state before it.

    And the sum of its dt, infinite where a document starts in it.
    """
    block, chunk = tl.program_id(0), first_chunk + tl.program_id(1)
    batch, part = (tl.program_id(2) // (NT // COLUMNS)).to(tl.int64), tl.program_id(2) % (NT // COLUMNS)
    blocks = tl.num_programs(0)
    n, lane = part * COLUMNS + tl.arange(0, COLUMNS), tl.max_contiguous(tl.arange(0, BLOCK), BLOCK // 32)
    at = n[:, None] * BLOCK + lane[None, :]
    A = tl.load(A_ptr + block * (NT * BLOCK) + at)
    begin = chunk * chunk_tokens
    limit = tl.minimum(begin + chunk_tokens, S)
    input_base = input_ptr + batch * s_in_b + block * BLOCK
    step_base = step_ptr + (batch * blocks + block) * length * BLOCK
    rows_base = rows_ptr + batch * length * NT + n
    state = tl.zeros([COLUMNS, BLOCK], tl.float32)
    pairs = tl.cdiv(limit - begin, 2 * GROUP)
    last = begin + (2 * pairs - 1) * GROUP
    first = last if REVERSE else begin
    steps = _load_rows(step_base, first, limit, BLOCK, lane, BLOCK, GROUP)
    inputs = _load_rows(input_base, first, limit, s_in_s, lane, E - block * BLOCK, GROUP)
    vectors = _load_vectors(rows_base, first, NT, GROUP)
    # Zero, in the layout of a load: zeros themselves would keep another through the loop.
    total = tl.load(A_ptr + block * (NT * BLOCK) + lane[None, :]) * 0.0
    for k in range(pairs):
        for half in tl.static_range(2):  # Twice the code moves no registers from the next tokens to these.
            first = last - (2 * k + half) * GROUP if REVERSE else begin + (2 * k + half) * GROUP
            following = tl.maximum(first - GROUP, begin) if REVERSE else tl.minimum(first + GROUP, last)
            next_steps = _load_rows(step_base, following, limit, BLOCK, lane, BLOCK, GROUP)
            next_inputs = _load_rows(input_base, following, limit, s_in_s, lane, E - block * BLOCK, GROUP)
            next_vectors = _load_vectors(rows_base, following, NT, GROUP)
            resets = _load_resets(start_ptr, batch, first, limit, s_start_b, s_start_s, STARTS, GROUP)
            for j in tl.static_range(GROUP):
                if REVERSE:
                    decay = _decay(steps[GROUP - 1 - j], A, resets[GROUP - 1 - j], STARTS)
                    state = (state + inputs[GROUP - 1 - j] * vectors[GROUP - 1 - j]) * decay
                else:
                    state = _decay(steps[j], A, resets[j], STARTS) * state + (steps[j] * inputs[j]) * vectors[j]
                total += steps[j]
                if STARTS:
                    total -= resets[j]
            steps, inputs, vectors = next_steps, next_inputs, next_vectors
    place = (batch * chunks + chunk) * blocks + block
    tl.store(state_ptr + place * (NT * BLOCK) + at, state)
    tl.store(sum_ptr + place * BLOCK + lane[None, :], total)


@triton.jit
def carry_kernel(
    state_ptr, sum_ptr, A_ptr, begin_ptr, end_ptr, chunks,
    REVERSE: tl.constexpr, BEGIN: tl.constexpr, STORE: tl.constexpr, END: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """From what the chunks leave of a zero state, what there is before each (in its place, if STORE) and at the end.

    In reverse the same for gradients: what there is after each chunk, and before the first. What the chunk passed last leaves is
    for the end alone: without END it need not have been written.
    """
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0)
    n, lane = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    state_at = n[:, None] * BLOCK + lane[None, :]
    A = tl.load(A_ptr + block * (NT * BLOCK) + state_at)
    carried = tl.zeros([COLUMNS, BLOCK], tl.float32)
    if BEGIN:
        carried += tl.load(begin_ptr + (batch * blocks + block) * (NT * BLOCK) + state_at)
    for k in range(chunks):
        place = (batch * chunks + (chunks - 1 - k if REVERSE else k)) * blocks + block
        left = tl.load(state_ptr + place * (NT * BLOCK) + state_at)
        total = tl.load(sum_ptr + place * BLOCK + lane)[None, :]
        if STORE:
            tl.store(state_ptr + place * (NT * BLOCK) + state_at, carried)
        reset = total == float("inf")
        carried = tl.where(reset, 0.0, tl.exp2(tl.where(reset, 0.0, total) * A)) * carried + left
    if END:
        tl.store(end_ptr + (batch * blocks + block) * (NT * BLOCK) + state_at, carried)


@triton.jit
def scan_kernel(
    x_ptr, step_ptr, start_ptr, A_ptr, rows_ptr, D_ptr, begin_ptr, kept_ptr, end_ptr, y_ptr,
    S, E, length, chunk_tokens, batches,
    s_x_b, s_x_s, s_start_b, s_start_s, s_kept_b, s_y_b, s_y_p, s_y_k, s_y_s,
    STARTS: tl.constexpr, SKIP: tl.constexpr, BEGIN: tl.constexpr, KEEP: tl.constexpr, ONLY: tl.constexpr,
    SEGMENT: tl.constexpr, NT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What some state dimensions have in y, in a chunk of a block of channels, from the state before it.

    And the state before each segment, and after the last token. ONLY: there is one chunk.
    """
    block, chunk = tl.program_id(0), tl.program_id(1)
    batch, part = (tl.program_id(2) // (NT // COLUMNS)).to(tl.int64), tl.program_id(2) % (NT // COLUMNS)
    blocks, chunks = tl.num_programs(0), tl.num_programs(1)
    n, lane = part * COLUMNS + tl.arange(0, COLUMNS), tl.max_contiguous(tl.arange(0, BLOCK), BLOCK // 32)
    channel, count = block * BLOCK + lane, E - block * BLOCK
    state_at = n[:, None] * BLOCK + lane[None, :]
    A = tl.load(A_ptr + block * (NT * BLOCK) + state_at)
    state = tl.zeros([COLUMNS, BLOCK], tl.float32)
    if BEGIN:
        state += tl.load(begin_ptr + ((batch * chunks + chunk) * blocks + block) * (NT * BLOCK) + state_at)
    skip = tl.zeros([BLOCK], tl.float32)
    if SKIP:  # Added by one part.
        skip += tl.load(D_ptr + channel, mask=channel < tl.where(part == 0, E, 0), other=0.0).to(tl.float32)
    begin = chunk * chunk_tokens
    limit = tl.minimum(begin + chunk_tokens, S)
    pairs = tl.cdiv(limit - begin, 2 * GROUP)
    last = begin + (2 * pairs - 1) * GROUP
    x_base = x_ptr + batch * s_x_b + block * BLOCK
    step_base = step_ptr + (batch * blocks + block) * length * BLOCK
    B_base = rows_ptr + batch * length * NT + n
    C_base = B_base + tl.cast(batches, tl.int64) * length * NT
    kept_base = kept_ptr
    if KEEP:
        kept_base = kept_ptr + batch * s_kept_b + block * (NT * BLOCK)
    y_base = y_ptr + batch * s_y_b + part.to(tl.int64) * s_y_p + block.to(tl.int64) * s_y_k
    steps = _load_rows(step_base, begin, limit, BLOCK, lane, BLOCK, GROUP)
    xs = _load_rows(x_base, begin, limit, s_x_s, lane, count, GROUP)
    Bs = _load_vectors(B_base, begin, NT, GROUP)
    for k in range(pairs):
        if KEEP:
            now = begin + 2 * k * GROUP
            if now % SEGMENT == 0:
                tl.store(kept_base + (now // SEGMENT * blocks).to(tl.int64) * (NT * BLOCK) + state_at, state)
        for half in tl.static_range(2):  # Twice the code moves no registers from the next tokens to these.
            first = begin + (2 * k + half) * GROUP
            following = tl.minimum(first + GROUP, last)
            next_steps = _load_rows(step_base, following, limit, BLOCK, lane, BLOCK, GROUP)
            next_xs = _load_rows(x_base, following, limit, s_x_s, lane, count, GROUP)
            next_Bs = _load_vectors(B_base, following, NT, GROUP)
            Cs = _load_vectors(C_base, first, NT, GROUP)
            resets = _load_resets(start_ptr, batch, first, limit, s_start_b, s_start_s, STARTS, GROUP)
            y_at = y_base + first.to(tl.int64) * s_y_s
            for j in tl.static_range(GROUP):
                state = _decay(steps[j], A, resets[j], STARTS) * state + (steps[j] * xs[j]) * Bs[j]
                y = tl.sum(state * Cs[j], axis=0) + skip * tl.reshape(xs[j], [BLOCK])
                tl.store(y_at + j * s_y_s + lane, y.to(y_ptr.dtype.element_ty), mask=lane < tl.where(first + j < limit, count, 0))
            steps, xs, Bs = next_steps, next_xs, next_Bs
    if ONLY or chunk == chunks - 1:
        tl.store(end_ptr + (batch * blocks + block) * (NT * BLOCK) + state_at, state)


@triton.jit
def sum_parts_kernel(part_ptr, y_ptr, S, E, parts, s_y_b, s_y_s, ROWS: tl.constexpr):
    """y [B, S, E], from what parts of the state have in it [B, parts, K, S, BLOCK]."""
    block, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    inside = (t < S) & (block * BLOCK + lane < E)
    y = tl.zeros([ROWS, BLOCK], tl.float32)
    for part in range(parts):
        at = ((batch * parts + part) * tl.num_programs(1) + block) * S + t
        y += tl.load(part_ptr + at * BLOCK + lane, mask=inside, other=0.0)
    tl.store(y_ptr + batch * s_y_b + t * s_y_s + block * BLOCK + lane, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _recompute(
    kept, scratch, step_base, x_base, rows_base, start_ptr, A, batch, first, groups, limit, s_x_s, s_start_b, s_start_s,
    lane, count, state_at, STARTS: tl.constexpr, NT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Scan a segment from the state before it and write the state before every STEPS tokens to scratch memory."""
    state = tl.load(kept + state_at)
    last = first + groups * STEPS - AHEAD
    steps = _load_rows(step_base, first, limit, BLOCK, lane, BLOCK, AHEAD)
    xs = _load_rows(x_base, first, limit, s_x_s, lane, count, AHEAD)
    Bs = _load_vectors(rows_base, first, NT, AHEAD)
    for k in range(groups):
        tl.store(scratch + state_at, state)
        scratch += COLUMNS * BLOCK
        for piece in tl.static_range(STEPS // AHEAD):
            at = first + k * STEPS + piece * AHEAD
            following = tl.minimum(at + AHEAD, last)
            next_steps = _load_rows(step_base, following, limit, BLOCK, lane, BLOCK, AHEAD)
            next_xs = _load_rows(x_base, following, limit, s_x_s, lane, count, AHEAD)
            next_Bs = _load_vectors(rows_base, following, NT, AHEAD)
            resets = _load_resets(start_ptr, batch, at, limit, s_start_b, s_start_s, STARTS, AHEAD)
            for j in tl.static_range(AHEAD):
                state = _decay(steps[j], A, resets[j], STARTS) * state + (steps[j] * xs[j]) * Bs[j]
            steps, xs, Bs = next_steps, next_xs, next_Bs


@triton.jit
def _adjoint(
    h, g, g_A, A, B, C, steps, Xs, g_ys, resets, g_Xs, g_exponents, STARTS: tl.constexpr,
):  # fmt: skip
    """STEPS tokens of one state dimension, forwards from the state h and backwards from the gradient g of the last.

    Adds to g_A and to the sums over states of g B and of the gradient of the exponents, and returns what a lane's channels
    have in the gradients of B and C, [1, 32, 2 STEPS].
    """
    decays = ()
    decayed = ()
    of_C = ()
    for i in tl.static_range(STEPS):
        decays += (_decay(steps[i], A, resets[i], STARTS),)
        decayed += (decays[i] * h,)
        h = decayed[i] + Xs[i] * B[i]
        of_C += (tl.sum(tl.reshape(h * g_ys[i], [1, 32, BLOCK // 32]), axis=2),)
    of_B = ()
    new_g_Xs = ()
    new_g_exponents = ()
    for i in tl.static_range(STEPS):
        g += g_ys[STEPS - 1 - i] * C[STEPS - 1 - i]
        of_B += (tl.sum(tl.reshape(g * Xs[STEPS - 1 - i], [1, 32, BLOCK // 32]), axis=2),)
        new_g_Xs += (g_Xs[STEPS - 1 - i] + g * B[STEPS - 1 - i],)
        g_exponent = g * decayed[STEPS - 1 - i]
        new_g_exponents += (g_exponents[STEPS - 1 - i] + g_exponent * A,)
        g_A += g_exponent * steps[STEPS - 1 - i]
        g *= decays[STEPS - 1 - i]
    terms = _stack(_reversed(of_B) + of_C, 2 * STEPS, 1, 32)
    return g, g_A, _reversed(new_g_Xs), _reversed(new_g_exponents), terms


@triton.jit
def _load_dimension(A_ptr, h_base, g_base, lane, j):
    """A, the state and the gradients of the state and of A, of one state dimension."""
    A, h = tl.load(A_ptr + j * BLOCK + lane[None, :]), tl.load(h_base + j * BLOCK)
    return A, h, tl.load(g_base + j * BLOCK), tl.load(g_base + j * BLOCK + COLUMNS * BLOCK)


@triton.jit
def _sum_lanes(terms, EXACT: tl.constexpr):
    """[1, 32, 2 STEPS] summed over lanes, in every column of [1, 2 STEPS, COLUMNS] or in one."""
    if EXACT:
        return tl.sum(terms, axis=1)[:, :, None]
    else:
        # The tensor cores drop the low 13 bits: half of what they can be, added first, makes that rounding.
        rounded = (terms.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        ones = tl.full([1, 32, 16], 1.0, tl.float32)
        return tl.dot(tl.permute(rounded, (0, 2, 1)), ones, input_precision="tf32")


@triton.jit
def gradient_kernel(
    x_ptr, step_ptr, start_ptr, A_ptr, rows_ptr, columns_ptr, kept_ptr, g_y_ptr, g_begin_ptr,
    scratch_ptr, g_ptr, sum_ptr, share_ptr, g_end_ptr, S, E, N, length, chunk_tokens, batches,
    s_x_b, s_x_s, s_start_b, s_start_s, s_kept_b, s_g_y_b, s_g_y_s,
    STARTS: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, EXACT: tl.constexpr,
    SEGMENT: tl.constexpr, NT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk, a block of channels and some state dimensions, from that of the state after it.

    For x and dt, the sums over those dimensions: of g B, and of the gradients of the exponents times A.
    """
    block, chunk = tl.program_id(0), tl.program_id(1)
    batch, part = (tl.program_id(2) // (NT // COLUMNS)).to(tl.int64), tl.program_id(2) % (NT // COLUMNS)
    blocks, chunks, parts = tl.num_programs(0), tl.num_programs(1), NT // COLUMNS
    program = (batch * chunks + chunk) * blocks + block
    n, lane = part * COLUMNS + tl.arange(0, COLUMNS), tl.max_contiguous(tl.arange(0, BLOCK), BLOCK // 32)
    count = E - block * BLOCK
    state_at = tl.arange(0, COLUMNS)[:, None] * BLOCK + lane[None, :]
    g_ptr += (program * parts + part) * (2 * COLUMNS * BLOCK)
    g_base = g_ptr + lane[None, :]
    scratch_ptr += (program * parts + part) * (SEGMENT // STEPS * COLUMNS * BLOCK)
    A_ptr += (block * parts + part) * (COLUMNS * BLOCK)
    kept_ptr += batch * s_kept_b + (block * parts + part) * (COLUMNS * BLOCK)
    tl.store(g_ptr + COLUMNS * BLOCK + state_at, tl.zeros([COLUMNS, BLOCK], tl.float32))
    g_state = tl.zeros([COLUMNS, BLOCK], tl.float32)
    if BEGIN:
        g_state += tl.load(g_begin_ptr + (program * parts + part) * (COLUMNS * BLOCK) + state_at)
    tl.store(g_ptr + state_at, g_state)
    begin = chunk * chunk_tokens
    limit = tl.minimum(begin + chunk_tokens, S)
    x_base = x_ptr + batch * s_x_b + block * BLOCK
    g_y_base = g_y_ptr + batch * s_g_y_b + block * BLOCK
    step_base = step_ptr + (batch * blocks + block) * length * BLOCK
    columns_ptr += batch * length * (2 * NT) + part * (COLUMNS * 2 * STEPS)
    # [2, B, parts, K, S, BLOCK] and [K, 2, B, S / STEPS, N, STEPS]
    X_base = sum_ptr + ((batch * parts + part) * blocks + block) * length * BLOCK
    exponent_base = X_base + tl.cast(batches, tl.int64) * parts * blocks * length * BLOCK
    share_base = share_ptr + (block.to(tl.int64) * 2 * batches + batch) * length * NT + part * (COLUMNS * STEPS)
    term = tl.arange(0, 2 * STEPS)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    share_at = (term // STEPS).to(tl.int64) * batches * length * NT + column * STEPS + term % STEPS
    step = tl.arange(0, STEPS)[None, :]
    segments = tl.cdiv(limit - begin, SEGMENT)
    for s in range(segments):
        segment_first = begin + (segments - 1 - s) * SEGMENT
        segment_limit = tl.minimum(segment_first + SEGMENT, limit)
        groups = tl.cdiv(segment_limit - segment_first, STEPS)
        kept = kept_ptr + (segment_first // SEGMENT * blocks).to(tl.int64) * (NT * BLOCK)
        _recompute(
            kept, scratch_ptr, step_base, x_base, rows_ptr + batch * length * NT + n, start_ptr, tl.load(A_ptr + state_at), batch,
            segment_first, groups, segment_limit, s_x_s, s_start_b, s_start_s, lane, count, state_at, STARTS, NT, AHEAD,
        )  # fmt: skip
        for k in range(groups):
            group = groups - 1 - k
            first = segment_first + group * STEPS
            steps = _load_rows(step_base, first, limit, BLOCK, lane, BLOCK, STEPS)
            xs = _load_rows(x_base, first, limit, s_x_s, lane, count, STEPS)
            g_ys = _load_rows(g_y_base, first, limit, s_g_y_s, lane, count, STEPS)
            resets = _load_resets(start_ptr, batch, first, limit, s_start_b, s_start_s, STARTS, STEPS)
            Xs = ()
            g_Xs = ()
            g_exponents = ()
            for i in tl.static_range(STEPS):
                Xs += (steps[i] * xs[i],)
                g_Xs += (tl.zeros([1, BLOCK], tl.float32),)
                g_exponents += (tl.zeros([1, BLOCK], tl.float32),)
            # Scratch memory and gradients of the state may have been written by another thread.
            tl.debug_barrier()
            h_base = scratch_ptr + group.to(tl.int64) * (COLUMNS * BLOCK) + lane[None, :]
            column_base = columns_ptr + first.to(tl.int64) * (2 * NT) + step
            next_B = _unstack(tl.load(column_base), STEPS, 1)
            next_C = _unstack(tl.load(column_base + STEPS), STEPS, 1)
            # Two state dimensions ahead: what comes from scratch memory may come from far.
            evens = _load_dimension(A_ptr, h_base, g_base, lane, 0)
            odds = _load_dimension(A_ptr, h_base, g_base, lane, 1)
            shares = tl.zeros([1, 2 * STEPS, COLUMNS], tl.float32)
            for pair in tl.range(tl.cdiv(tl.minimum(N, COLUMNS), 2), num_stages=1):
                for half in tl.static_range(2):  # Twice the code moves no registers from one state dimension to the next.
                    j = pair * 2 + half
                    B, C = next_B, next_C
                    following = tl.minimum(j + 1, COLUMNS - 1)
                    next_B = _unstack(tl.load(column_base + following * (2 * STEPS)), STEPS, 1)
                    next_C = _unstack(tl.load(column_base + following * (2 * STEPS) + STEPS), STEPS, 1)
                    if half == 0:
                        A, h, g, g_A = evens
                        evens = _load_dimension(A_ptr, h_base, g_base, lane, tl.minimum(j + 2, COLUMNS - 1))
                    else:
                        A, h, g, g_A = odds
                        odds = _load_dimension(A_ptr, h_base, g_base, lane, tl.minimum(j + 2, COLUMNS - 1))
                    g, g_A, g_Xs, g_exponents, terms = _adjoint(
                        h, g, g_A, A, B, C, steps, Xs, g_ys, resets, g_Xs, g_exponents, STARTS
                    )
                    tl.store(g_base + j * BLOCK, g)
                    tl.store(g_base + j * BLOCK + COLUMNS * BLOCK, g_A)
                    shares = tl.where(column == j, _sum_lanes(terms, EXACT), shares)
            tl.store(share_base + first.to(tl.int64) * NT + share_at, shares)
            for i in tl.static_range(STEPS):
                row_at = (first + i).to(tl.int64) * BLOCK + lane[None, :]
                tl.store(X_base + row_at, g_Xs[i])
                tl.store(exponent_base + row_at, g_exponents[i])
        tl.debug_barrier()
    if END:
        end_at = g_end_ptr + ((batch * blocks + block) * parts + part) * (COLUMNS * BLOCK) + state_at
        if chunk == 0:
            tl.store(end_at, tl.load(g_ptr + state_at))


@triton.jit
def finish_kernel(
    x_ptr, dt_ptr, bias_ptr, D_ptr, g_y_ptr, sum_ptr, g_x_ptr, g_dt_ptr, g_D_ptr, g_bias_ptr, S, E, length, parts,
    s_x_b, s_x_s, s_dt_b, s_dt_s, s_g_y_b, s_g_y_s, s_g_x_b, s_g_x_s, s_g_dt_b, s_g_dt_s,
    SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of x and dt of a segment, from the sums over states, and what it has in those of D and dt_bias."""
    segment, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, blocks, batches = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    lane = tl.arange(0, BLOCK)[None, :]
    channel = block * BLOCK + lane
    bias = tl.zeros([1, BLOCK], tl.float32)
    skip = tl.zeros([1, BLOCK], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + channel, mask=channel < E, other=0.0).to(tl.float32)
    if SKIP:
        skip += tl.load(D_ptr + channel, mask=channel < E, other=0.0).to(tl.float32)
    g_D = tl.zeros([ROWS, BLOCK], tl.float32)
    g_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    end = tl.minimum(segment * SEGMENT + SEGMENT, S)
    for first in range(segment * SEGMENT, end, ROWS):
        t = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (t < end) & (channel < E)
        g_X = tl.zeros([ROWS, BLOCK], tl.float32)
        g_step = tl.zeros([ROWS, BLOCK], tl.float32)
        for part in range(parts):
            at = (((batch * parts + part) * blocks + block) * length + t) * BLOCK + lane
            g_X += tl.load(sum_ptr + at, mask=inside, other=0.0)
            at += tl.cast(batches, tl.int64) * parts * blocks * length * BLOCK
            g_step += tl.load(sum_ptr + at, mask=inside, other=0.0)
        x = tl.load(x_ptr + batch * s_x_b + t * s_x_s + channel, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(dt_ptr + batch * s_dt_b + t * s_dt_s + channel, mask=inside, other=0.0).to(tl.float32) + bias
        g_step = g_step * LN_2 + g_X * x
        if SOFTPLUS:
            g_step *= tl.sigmoid(step)
            step = softplus(step)
        g_x = g_X * step
        if SKIP:
            g_y = tl.load(g_y_ptr + batch * s_g_y_b + t * s_g_y_s + channel, mask=inside, other=0.0).to(tl.float32)
            g_x += g_y * skip
            g_D += g_y * x
        g_bias += g_step
        tl.store(g_x_ptr + batch * s_g_x_b + t * s_g_x_s + channel, g_x.to(g_x_ptr.dtype.element_ty), mask=inside)
        tl.store(g_dt_ptr + batch * s_g_dt_b + t * s_g_dt_s + channel, g_step.to(g_dt_ptr.dtype.element_ty), mask=inside)
    at = ((batch * segments + segment) * blocks + block) * BLOCK + lane
    if SKIP:
        tl.store(g_D_ptr + at, tl.sum(g_D, axis=0)[None, :])
    if BIAS:
        tl.store(g_bias_ptr + at, tl.sum(g_bias, axis=0)[None, :])


@triton.jit
def sum_shares_kernel(
    share_ptr, g_B_ptr, g_C_ptr, S, N, length, blocks, s_B_b, s_B_s, s_C_b, s_C_s,
    NT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of B or C of one sequence: what the blocks of channels have in it."""
    of_C, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    batches = tl.num_programs(2)
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)[:, None].to(tl.int64)
        share_at = share_ptr + ((block * 2 + of_C) * batches + batch) * length * NT + at[None, :]
        inside = (block < blocks) & (at < length.to(tl.int64) * NT)[None, :]
        total += tl.sum(tl.load(share_at, mask=inside, other=0.0), axis=0)
    t, n = at // (NT * STEPS) * STEPS + at % STEPS, at // STEPS % NT
    inside = (t < S) & (n < N)
    if of_C == 0:
        tl.store(g_B_ptr + batch * s_B_b + t * s_B_s + n, total.to(g_B_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(g_C_ptr + batch * s_C_b + t * s_C_s + n, total.to(g_C_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_chunks_kernel(
    g_share_ptr, g_D_share_ptr, g_bias_share_ptr, g_A_ptr, g_D_ptr, g_bias_ptr, E, N, chunks, segments, s_A_e, s_A_n,
    SKIP: tl.constexpr, BIAS: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """The gradients of A, D and dt_bias: what the chunks of all sequences have in them."""
    block, part = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    n, lane = part * COLUMNS + tl.arange(0, COLUMNS)[:, None], tl.arange(0, BLOCK)[None, :]
    channel = block * BLOCK + lane
    g_A = tl.zeros([COLUMNS, BLOCK], tl.float32)
    g_D = tl.zeros([1, BLOCK], tl.float32)
    g_bias = tl.zeros([1, BLOCK], tl.float32)
    for k in range(chunks):
        place = (tl.cast(k, tl.int64) * blocks + block) * (NT // COLUMNS) + part
        g_A += tl.load(g_share_ptr + (place * 2 + 1) * (COLUMNS * BLOCK) + (n - part * COLUMNS) * BLOCK + lane)
    for k in range(segments):
        place = (tl.cast(k, tl.int64) * blocks + block) * BLOCK
        if SKIP:
            g_D += tl.load(g_D_share_ptr + place + lane)
        if BIAS:
            g_bias += tl.load(g_bias_share_ptr + place + lane)
    at = g_A_ptr + channel.to(tl.int64) * s_A_e + n * s_A_n
    tl.store(at, g_A.to(g_A_ptr.dtype.element_ty), mask=(channel < E) & (n < N))
    if SKIP:
        tl.store(g_D_ptr + channel, g_D.to(g_D_ptr.dtype.element_ty), mask=channel < tl.where(part == 0, E, 0))
    if BIAS:
        tl.store(g_bias_ptr + channel, g_bias.to(g_bias_ptr.dtype.element_ty), mask=channel < tl.where(part == 0, E, 0))
