#!/usr/bin/env bash
# ptxas 12.8.93, which Triton 3.6.0 and 3.7.1 bundle for Hopper (sm_90a), miscompiles matrix products in both branches of an if.
#
# Expected: with one `tl.dot` before an if and one in each branch, every wgmma reads its operands where they lie in shared memory.
# Seen: the descriptor of an operand's second K slice (a pair of uniform registers: the address of the first slice + 2, and a word
#     with the swizzle) is set in the first branch only, but the second branch uses that pair too, as if it ran after the first.
#     There the pair holds whatever it held before the if; here, the descriptor of the product before the if: no + 2, and another
#     swizzle. From the second slice on, the product in the second branch reads the wrong elements.
# Where: in the machine code of the kernel below: bf16, K = 16 before the if, K = 64 in its branches, with tiles at the same address
#     of shared memory. The PTX is right: ptxas 12.9.86, which Triton 3.6.0 bundles for Blackwell, translates the same PTX correctly.
#     A product after the if, instead of in an else, was miscompiled likewise; in code without branches we saw descriptors that were
#     never set at all (neither is checked here). What they have in common: tiles at one address with rows of different widths.
# Why it matters: no error, no warning, plausible numbers; sometimes an illegal memory access. We found it as silently wrong gradients.
# Way out: a ptxas of CUDA 12.9 or newer (for instance TRITON_PTXAS_PATH=.../triton/backends/nvidia/bin/ptxas-blackwell); or tiles
#     whose rows all have 128 bytes or more, 64 columns of 16-bit numbers: they are all swizzled alike.
#
# Needs python3 (3.10 or newer) with pip and the network, or with Triton 3.6.0. No GPU: the check follows the uniform registers
# through the machine code. Where python3 has PyTorch, Triton 3.6 and a Hopper GPU, the kernel also runs.
# Exits 0 if all is as stated, 1 if something changed, 2 if Triton could not be installed.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset TRITON_PTXAS_PATH TRITON_INTERPRET DISABLE_PTXAS_OPT PTXAS_OPTIONS
export TRITON_CACHE_DIR=$tmp/cache PYTHONDONTWRITEBYTECODE=1

cat > kernel.py <<'END'
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["branch"])
def kernel(b_ptr, x_ptr, y_ptr, out_ptr, branch):
    """If branch is 0, out = (b b^T) x, else out = x y. b: [64, 16]; x, y, out: [programs, 64, 64]."""
    r, n, first = tl.arange(0, 64), tl.arange(0, 16), tl.program_id(0) * 4096
    tile = r[:, None] * 64 + r[None, :]
    b = tl.load(b_ptr + r[:, None] * 16 + n[None, :])
    bb = tl.dot(b, tl.trans(b))
    x = tl.load(x_ptr + first + tile)
    if branch == 0:
        out = tl.dot(bb.to(tl.bfloat16), x)
    else:
        out = tl.dot(x, tl.load(y_ptr + first + tile))
    tl.store(out_ptr + first + tile, out)
END
cat > check.py <<'END'
import os, re, subprocess, sys
from pathlib import Path
import triton
from kernel import kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
NEVER = frozenset({(0, "never set", 0)})
os.environ["PATH"] = f"{TOOLS}:{os.environ['PATH']}"  # cuobjdump calls nvdisasm

def run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

def join(a, b):
    return b if a is None else a if b is None else {u: a.get(u, NEVER) | b.get(u, NEVER) for u in {*a, *b}}

def next_register(u, k=1):
    return f"UR{int(u[2:]) + k}"

def products(code):
    """For each product its wgmmas: address, text, and for the four registers of the two descriptors the definitions that reach
    it along real paths: (address, symbol, offset), for the value symbol + offset. The symbol is the instruction that made the
    value; without loops, each runs once. Low words do not carry into high ones: they are addresses in shared memory / 16."""
    arriving, here, found = {}, {}, [[]]
    for address, text in code:
        here = join(here, arriving.get(address))
        if here is None:  # no path leads here
            continue
        def total(words):
            values = []
            for word in (w for w in words if w != "URZ" and not re.match("!?UP", w)):
                constant = ("", int(word, 0)) if re.match("-?0x", word) else (f"{word}@{address:#x}", 0)
                reaching = {d[1:] for d in here.get(word, NEVER)} if word[:2] == "UR" else {constant}
                values.append(reaching.pop() if len(reaching) == 1 else (f"several@{address:#x}", 0))
            return " + ".join(s for s, _ in values if s), sum(o for _, o in values) % 2**32
        predicate, op, rest = re.match(r"(@\S+ +)?(\S+) *(.*)", text).groups()
        to, *of = [word.strip() for word in rest.split(",")]
        if re.match(r"BRX|JM|CALL|RET|WARPSYNC\.C", op) or op.startswith("BRA") and int(rest.split()[-1], 0) < address:
            sys.exit(f"CHANGED: the check cannot follow {text!r}")
        if op.startswith("HGMMA"):
            u = re.search(r"gdesc\[(UR\d+)\]", rest)[1]
            found[-1].append((address, text, [(v, here.get(v, NEVER)) for v in (next_register(u, k) for k in range(4))]))
            found += [[]] * ("gsb0" in rest)
        elif op.startswith("BRA"):
            target = int(rest.split()[-1], 0)
            arriving[target] = join(arriving.get(target), here)
        elif re.fullmatch(r"UR\d+", to):
            values = {to: (f"{op}@{address:#x}", 0)}
            if op in ("UMOV", "UIADD3", "UIADD3.X", "UIADD3.64"):
                values[to] = total(of)
            if op == "UIADD3.64":
                values[next_register(to)] = total([next_register(u) for u in of if re.fullmatch(r"UR\d+", u)])
            elif ".64" in op or "WIDE" in op:
                values[next_register(to)] = (f"{op}.high@{address:#x}", 0)
            kept = {u: here.get(u, NEVER) if predicate else frozenset() for u in values}
            here = {**here, **{u: kept[u] | {(address, *v)} for u, v in values.items()}}
        if op.startswith(("BRA", "EXIT")) and not predicate and not of:
            here = None
    return found[:-1]

def consistent(product, k):
    """Whether the words k and k + 1 are the descriptors of consecutive K slices of one operand: k = 0 is A, k = 2 is B."""
    low, high = ([{d[1:] for d in words[i][1]} for _, _, words in product] for i in (k, k + 1))
    (symbol, offset), step = min(low[0]), 0x80 if k == 2 and "tnspB" in product[0][1] else 2
    return low == [{(symbol, offset + step * i)} for i in range(len(low))] and high == [{("", min(high[0])[1])}] * len(high)

def judge(code):
    found = products(code)
    if [len(p) for p in found] != [1, 4, 4]:
        sys.exit(f"CHANGED: products of {[len(p) for p in found]} wgmmas instead of [1, 4, 4]")
    # An A in registers, as in "HGMMA R24, R56, gdesc[UR8]", has no descriptor.
    right = [consistent(p, 2) and (bool(re.search(r"R\d+, R\d+, gdesc", p[0][1])) or consistent(p, 0)) for p in found]
    if right == [True, True, False]:
        jump, target = next((a, int(t.split()[-1], 0)) for a, t in reversed(code) if a < found[1][0][0] and re.match(r"@.* BRA ", t))
        print(f"  WRONG: the second branch, entered by a jump from {jump:#x} to {target:#x}, reads A at")
        base = min(found[2][0][2][0][1])[1]
        for address, text, words in found[2]:
            at = [f"{u} = {f'{s} + {o}'.replace(base, 'base') if s else hex(o)} (set at {a:#x})" for u, ds in words[:2] for a, s, o in ds]
            print(f"    {address:#x} {text.split()[0]} {re.search('gdesc.*?]', text)[0]}:", ", ".join(at))
        print(f"  while these, between {jump:#x} and {target:#x}, are in the first branch:")
        pair = "|".join(u for u, _ in found[2][1][2][:2])
        print(*(f"    {a:#x} {t}" for a, t in code if jump < a < target and re.match(rf"\S+ ({pair}),", t)), sep="\n")
    else:
        print("  right" if all(right) else f"  other descriptors than expected; consistent, by product: {right}")
    return right

signature = dict(b_ptr="*bf16", x_ptr="*bf16", y_ptr="*bf16", out_ptr="*fp32", branch="i32")
source = ASTSource(kernel, signature, attrs={(i,): [["tt.divisibility", 16]] for i in range(4)})
Path("kernel.ptx").write_text(triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=4)).asm["ptx"])
print("Triton", triton.__version__)
as_stated = True
for tool, version, expected in (("ptxas", "12.8.93", [True, True, False]), ("ptxas-blackwell", "12.9.86", [True] * 3)):
    found = re.search(r"V([\d.]+)", run(tool, "--version"))[1]
    print(f"{tool} {found}:")
    run(tool, "--gpu-name=sm_90a", "kernel.ptx", "-o", f"{tool}.cubin")
    sass = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", run("cuobjdump", "--dump-sass", f"{tool}.cubin"), re.M)
    as_stated &= judge([(int(a, 16), t) for a, t in sass]) == expected and found == version
sys.exit(0 if as_stated else "CHANGED: expected the second branch wrong with ptxas 12.8.93, and all right with 12.9.86")
END
cat > on_gpu.py <<'END'
import sys, torch
from kernel import kernel
torch.manual_seed(0)
b, x, y = (torch.randn(shape, device="cuda").bfloat16() for shape in ((64, 16), (2, 64, 64), (2, 64, 64)))
bb = (b.double() @ b.double().T).bfloat16()
errors = []
for branch, expected in enumerate((bb.double() @ x.double(), x.double() @ y.double())):
    out = torch.zeros(2, 64, 64, device="cuda")
    kernel[(2,)](b, x, y, out, branch, num_warps=4)
    errors.append(((out - expected).norm() / expected.norm()).item())
print(f"  relative errors: {errors[0]:.1e} in the first branch, {errors[1]:.1e} in the second")
if not errors[0] < 1e-2 or (errors[1] < 1e-2) != (sys.argv[1] == "right"):
    sys.exit(f"CHANGED: expected a right first branch and a {sys.argv[1]} second one")
END

if ! python3 -c 'import triton; assert triton.__version__ == "3.6.0"' 2> /dev/null; then
    python3 -m pip install -qq --disable-pip-version-check --no-deps --target site triton==3.6.0 || exit 2
fi
PYTHONPATH=$tmp/site${PYTHONPATH:+:$PYTHONPATH} python3 check.py

hopper='import torch, triton; assert triton.__version__[:4] == "3.6." and torch.cuda.get_device_capability() == (9, 0)'
if python3 -c "$hopper" 2> /dev/null; then
    echo "On the GPU, with the bundled ptxas:"
    TRITON_CACHE_DIR=$tmp/cache1 python3 on_gpu.py wrong
    echo "On the GPU, with ptxas-blackwell:"
    blackwell=$(python3 -c 'import os, triton; print(os.path.dirname(triton.__file__))')/backends/nvidia/bin/ptxas-blackwell
    TRITON_CACHE_DIR=$tmp/cache2 TRITON_PTXAS_PATH=$blackwell python3 on_gpu.py right
else
    echo "The kernel was not run: no Hopper GPU, or no PyTorch with Triton 3.6."
fi
echo "As stated."
