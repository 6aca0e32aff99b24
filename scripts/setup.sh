#!/bin/sh
# Makes .venv in the project's folder hold fedtune and everything that its demo and its tests need.
# Does nothing when that is so already. PYTHON=... chooses the interpreter.
# It takes the exact versions of requirements/. FEDTUNE_NEWEST=1 takes the newest of everything instead, beyond
# pyproject.toml's upper bounds too, to learn what they will break; a torch that .venv has already stays.
set -eu
unset CDPATH
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"

extras=dev,eval,report,flower,privacy,quant,image
case ${FEDTUNE_NEWEST:-} in
    '' | 1) newest=${FEDTUNE_NEWEST:-} ;;
    *)
        echo "fedtune set-up: FEDTUNE_NEWEST must be 1 or unset, got $FEDTUNE_NEWEST." >&2
        exit 1
        ;;
esac
# Exact (each file names the same), because the newest torch that an index offers need not have a CPU build beside it.
torch=torch==$(sed -n 's/^torch==//p' requirements/py311.txt)
[ -z "$newest" ] || torch=torch

py=.venv/bin/python
stamp=.venv/.fedtune-ready        # written last: its text is what was installed
started=.venv/.fedtune-started    # there while a set-up runs, and after one that did not finish
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'fedtune set-up: %s\n' "$*"; }
fail() {
    printf 'fedtune set-up: %s\n' "$*" >&2
    exit 1
}

# The file with the exact versions for .venv's Python; nothing where there is none, or where the newest are wanted.
locked() {
    [ -z "$newest" ] || return 0
    file=requirements/$("$py" -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null).txt
    [ ! -f "$file" ] || echo "$file"
}

# A moved or copied folder carries a .venv that still points to the old place, hence the path.
wanted() {
    printf '%s\n%s\n' "$root" "$extras ${newest:+newest}"
    cksum pyproject.toml scripts/setup.sh $(locked)
}

# What pyproject.toml requires, in the versions asked for. "installed": is it there (of torch alone: "installed torch")?
# "newest": prints it without upper bounds.
requirements() {
    "$py" - "$extras" "$newest" "$(locked)" "$@" <<'PYTHON'
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name

extras, newest, locked, what, *names = sys.argv[1:]
exact = {}
if locked:
    for line in Path(locked).read_text().splitlines():
        if "==" in line:
            pin = Requirement(line)
            exact[canonicalize_name(pin.name)] = pin.specifier
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
lines = [*project["dependencies"]]
for extra in extras.split(","):
    lines += project["optional-dependencies"][extra]
for requirement in map(Requirement, lines):
    if names and requirement.name not in names or requirement.marker and not requirement.marker.evaluate():
        continue
    if newest:
        lower = [str(bound) for bound in requirement.specifier if bound.operator == ">="]
        requirement.specifier = SpecifierSet(",".join(lower))
    if what == "newest":
        print(requirement)
        continue
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        sys.exit(1)
    allowed = requirement.specifier & exact.get(canonicalize_name(requirement.name), SpecifierSet())
    if not allowed.contains(installed, prereleases=True):
        sys.exit(1)
PYTHON
}

satisfied() { requirements installed "$@" 2>/dev/null; }

ready() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ] && [ -x .venv/bin/fedtune ] && satisfied
}

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer with its venv module."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3.14 python3; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with its venv module was found (looked for python3.13, python3.12, python3.11," \
        "python3.14 and python3 on the PATH). Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name one:" \
        "PYTHON=/path/to/python sh $0"
}

pip_install() {
    # A person sees pip's progress; a log gets only what ends it: warnings are of how this machine's pip is set up.
    if [ -t 1 ]; then
        "$py" -m pip install "$@"
    else
        "$py" -m pip install --quiet --quiet "$@"
    fi
}

# On Linux the torch of the default index comes with gigabytes of CUDA packages, of no use without an NVIDIA GPU.
cpu_torch() {
    # pip offers a "+cpu" version only where this machine is set up with a place that has one.
    case " $("$py" -m pip index versions torch 2>/dev/null | tr -s ',()\n' '    ') " in
        *" ${torch#*==}+cpu "*)
            if pip_install "$torch+cpu"; then return; fi
            ;;
    esac
    # uv knows by itself where torch's CPU builds are. It is used once, so it does not stay in .venv.
    if pip_install --target "$started/uv" uv &&
        "$started/uv/bin/uv" pip install --python "$py" --torch-backend cpu "$torch"; then
        return
    fi
    say "no CPU build of torch could be had, so the default one is installed: several gigabytes of CUDA packages come along."
}

if ready; then exit 0; fi

# One set-up at a time: the lock is this script's own file, and ends with the last process that holds it.
new=$(find_python)
exec 9<scripts/setup.sh
"$new" - <<'PYTHON'
import fcntl

try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("fedtune set-up: waiting for another set-up of this folder to end", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    print("fedtune set-up: this file system has no locks; do not start two set-ups at once", flush=True)
PYTHON
if ready; then exit 0; fi

# What a killed set-up left is not repaired but replaced: pip takes a half-unpacked package for an installed one.
if [ -e "$started" ] || ! usable "$py" || ! "$py" -m pip --version >/dev/null 2>&1 ||
    { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$root" ]; }; then
    [ ! -e .venv ] || say "replacing the unfinished or broken .venv"
    rm -rf .venv
    mkdir -p "$started"
    say "making .venv with $("$new" --version)"
    "$new" -m venv .venv || fail "making .venv failed; see above."
fi
mkdir -p "$started"
rm -f "$stamp"

if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && ! satisfied torch; then
    say "installing the CPU build of torch"
    cpu_torch
fi
again="installing failed; see above. Run the same command again to start over."
if [ -n "$newest" ]; then
    say "installing fedtune and the newest release of everything it needs (a few minutes)"
    requirements newest >"$started/newest.txt"
    # pip would put the default build of a newer torch in place of a CPU build
    "$py" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        >"$started/torch.txt" 2>/dev/null || true
    pip_install --upgrade --upgrade-strategy eager -r "$started/newest.txt" -c "$started/torch.txt" || fail "$again"
    pip_install --no-deps --editable . || fail "$again"
else
    lock=$(locked)
    [ -n "$lock" ] || say "requirements/ has no versions for $("$py" --version), so what pyproject.toml allows is taken"
    say "installing fedtune and what it needs (a few minutes the first time)"
    pip_install ${lock:+--constraint "$lock"} --editable ".[$extras]" || fail "$again"
fi

wanted >"$stamp"
rm -rf "$started"
say "done"
