#!/usr/bin/env bash
# Sets up .venv and runs the main job in small on real text: tokenizer, tokenised data, training (killed and resumed once),
# evaluation, a generated sample, export to Hugging Face. No download of text; everything lands in runs/quickstart-TIME.
#   ./launch/quickstart.sh                              a tiny hybrid on Python's own library
#   ARCH=mamba|mamba2|transformer|hybrid|all ./launch/quickstart.sh
#   ./launch/quickstart.sh --corpus FILE_OR_DIR         your own text or JSON lines, also .jsonl.zst
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/launch/setup.sh"
exec "$root/.venv/bin/python" "$root/tools/quickstart.py" "$@"
