#!/usr/bin/env bash
# Checks a GPU machine with its own Python and packages: no installs, each part under its own time limit.
#   benchmarks/gpu_check.sh OUT_DIR        writes OUT_DIR/gpu_check.json and OUT_DIR/gpu_check.txt
# Parts: GPU tests; the digits recipe on the GPU. The compiled loss op will add its build, sanitizers and benchmarks.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUT_DIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/plugins"
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python

# entry points without an installation: a dist-info folder that says where the plugins are
meta=$(mktemp -d)
trap 'rm -rf "$meta"' EXIT
"$python" - "$meta" <<'PY'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
folder = pathlib.Path(sys.argv[1], "kdcore-0.dist-info")
folder.mkdir()
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kdcore\nVersion: 0\n")
points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["kdcore"].items())
(folder / "entry_points.txt").write_text("[kdcore]\n" + points)
PY
export PYTHONPATH="$meta:$PYTHONPATH"

rows=()
part() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    rows+=("{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}")
    printf '%-12s exit %-4s %4s s (limit %s)\n' "$name" "$code" "$((SECONDS - start))" "$limit" | tee -a "$out/gpu_check.txt"
}

: >"$out/gpu_check.txt"
"$python" - >"$out/machine.json" <<'PY'
import json, platform, torch
gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
print(json.dumps({"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}))
PY
part tests 300 "$python" -m pytest -q -p no:cacheprovider -m gpu
part digits 180 "$python" -m kdcore run examples/digits.toml --set device=cuda --root "$out/runs"

printf '{"machine": %s, "parts": [%s]}\n' "$(cat "$out/machine.json")" "$(IFS=,; echo "${rows[*]}")" >"$out/gpu_check.json"
cat "$out/gpu_check.json"
