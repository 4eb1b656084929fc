#!/usr/bin/env bash
# Checks a GPU machine with its own Python and packages: no installs, each part under its own time limit.
#   benchmarks/gpu_check.sh OUT_DIR [PART...]       all parts, or the named ones: about 30 minutes
# Parts: build (the compiled op, for this GPU), tests (pytest -m gpu), memcheck racecheck initcheck (compute-sanitizer
# over small shapes), digits (a recipe on the GPU), bench (the losses against others), training (whole steps against
# others; a batch size that its limit cuts off costs no other), epoch (a small student under a cached teacher).
# Writes OUT_DIR/gpu_check.json, .txt (a table) and .log (what the parts said), part by part, OUT_DIR/bench, /training
# and /epoch.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUT_DIR [PART...]}" && cd "$1" && pwd)
shift
chosen=" ${*:-build tests memcheck racecheck initcheck digits bench training epoch} "
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# entry points without an installation: a dist-info folder that says where the plugins are
"$python" - "$scratch" <<'PY'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
folder = pathlib.Path(sys.argv[1], "kdcore-0.dist-info")
folder.mkdir()
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kdcore\nVersion: 0\n")
points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["kdcore"].items())
(folder / "entry_points.txt").write_text("[kdcore]\n" + points)
PY
export PYTHONPATH="$scratch:$PWD:$PWD/plugins"

# what the sanitizers watch: every kernel, dtype and mode, partial blocks, odd alignment, labels that are out of range
cat >"$scratch/small_shapes.py" <<'PY'
import itertools
import torch
from kdcore.losses import available_backends, dkd_loss, kd_loss

assert "cuda" in available_backends()
dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# tiles of 256 threads and of 512, rows of one block and of several, with whole words and without
shapes = ((2, 2, 3), (33, 130, 3), (12, 300, 0), (7, 1100, 1), (5, 4096, 0), (7, 4500, 3))
modes = (("none", 4.0), ("instance", 4.0), ("class", 4.0), ("class", 0.02))  # the last: exponentials need their maximum
kinds = itertools.product(dtypes, shapes, modes, (kd_loss, dkd_loss), ("mean", "none"))
for dtype, (rows, classes, padding), (mode, temperature), loss, reduction in kinds:
    wide = torch.randn(2, rows, classes + padding, generator=torch.Generator().manual_seed(rows)).to(dtype).cuda()
    student, teacher = wide[:, :, padding // 2 : padding // 2 + classes].unbind()
    labels = torch.arange(rows) % classes
    labels[rows // 2] = -100
    if rows > 6:
        labels[4], labels[5] = classes, -(2**40)
    settings = {"normalize": mode, "temperature": temperature, "reduction": reduction, "backend": "cuda"}
    settings |= {"ce_weight": 0.5, "label_smoothing": 0.1}
    student.requires_grad_()
    value = loss(student, teacher, labels.cuda(), **settings)
    torch.autograd.grad(value.sum(), student)
torch.cuda.synchronize()
print("done")
PY

machine=$("$python" - <<'PY'
import json, platform, torch
about = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
about |= {"gpu": None, "arch": None}
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability(0)
    about |= {"gpu": torch.cuda.get_device_name(0), "arch": f"{major}.{minor}"}
print(json.dumps(about))
PY
)
arch=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["arch"] or "9.0")' "$machine")
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} KDCORE_CUDA=1 KDCORE_REQUIRE_EXT=1

: >"$out/gpu_check.txt"
: >"$out/gpu_check.log"
rows=()
failed=0
part() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    [[ $chosen == *" $name "* ]] || return 0
    printf '\n== %s\n' "$name" >>"$out/gpu_check.log"
    timeout -k 5 "$limit" "$@" >>"$out/gpu_check.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=1
    rows+=("{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}")
    printf '%-10s exit %-4s %4s s (limit %s)\n' "$name" "$code" "$((SECONDS - start))" "$limit" |
        tee -a "$out/gpu_check.txt"
    printf '{"machine": %s, "parts": [%s]}\n' "$machine" "$(IFS=,; echo "${rows[*]}")" >"$out/gpu_check.json"
}

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
sanitize() { # tool, seconds; every tensor an allocation of its own, so that its ends are watched
    part "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 20 \
        "$python" "$scratch/small_shapes.py"
}

part build 180 "$python" setup.py build_ext --inplace
part tests 420 "$python" -m pytest -q -p no:cacheprovider -m gpu --tb=short --maxfail=50 --durations=10 \
    $(grep -lE 'mark\.gpu|on_a_gpu' tests/test_*.py) # the others may need packages that are not there
sanitize memcheck 180
sanitize racecheck 180
sanitize initcheck 180
part digits 120 "$python" -m kdcore run examples/digits.toml --set device=cuda --root "$scratch/runs"
part bench 560 "$python" benchmarks/bench_losses.py --device cuda --out "$out/bench"
part training 580 "$python" benchmarks/bench_training.py --device cuda --batches 1024,256,64,4096 --workers 8 \
    --students 3 --rounds 5 --minutes 1 --out "$out/training"
part epoch 180 "$python" benchmarks/bench_training.py --device cuda --batches 128 --ways cached \
    --teacher cifar_resnet56 --student cifar_resnet20 --rounds 5 --out "$out/epoch"
cat "$out"/bench/*.md "$out"/training/*.md "$out"/epoch/*.md >>"$out/gpu_check.txt" 2>/dev/null
cat "$out/gpu_check.json"
exit "$failed"
