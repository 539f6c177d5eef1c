# Sourced by scripts/demo and scripts/test: makes .venv from requirements.lock, and finds or installs
# what the system's packages bring. Says what it installs; as a normal user it prints the line to run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PATH:/usr/sbin:/usr/local/sbin"

say() { printf '%s\n' "$*" >&2; }

# need PACKAGE TEST…: install a system package unless the test finds it.
need() {
  local package=$1
  shift
  if "$@" >/dev/null 2>&1; then return; fi
  case " ${missing[*]} " in *" $package "*) ;; *) missing+=("$package") ;; esac
}

have_postgresql() { command -v initdb || ls /usr/lib/postgresql/*/bin/initdb; }
have_dynsec() {
  local file
  for file in /usr/lib/*/mosquitto_dynamic_security.so /usr/lib/mosquitto_dynamic_security.so \
    /usr/local/lib/mosquitto_dynamic_security.so /opt/homebrew/lib/mosquitto_dynamic_security.so; do
    if [ -e "$file" ]; then return 0; fi
  done
  return 1
}

have_fonts() { ls /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf || fc-list | grep -q .; }

install_missing() {
  if [ ${#missing[@]} -eq 0 ]; then return; fi
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "Installing from the system's packages: ${missing[*]}"
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
  elif command -v brew >/dev/null; then
    say "Missing: ${missing[*]}. Run:  brew install ${missing[*]}"
    exit 1
  else
    say "Missing: ${missing[*]}. Run:  sudo apt-get install ${missing[*]}"
    exit 1
  fi
}

# One set-up at a time; done again only when the lock or the project's metadata changed.
make_venv() {
  local mark=.venv/.installed want
  want=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
  if [ -x .venv/bin/bellwether ] && [ "$(cat $mark 2>/dev/null)" = "$want" ]; then return; fi
  say "Setting up .venv from requirements.lock"
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv -q --python '>=3.11' .venv
    uv pip install -q --compile-bytecode --python .venv/bin/python --require-hashes -r requirements.lock
    uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
  else
    local python
    python=$(python_to_use)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install -q --require-hashes -r requirements.lock
    .venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
  fi
  # Written now, whatever PYTHONDONTWRITEBYTECODE says: every start of a command is faster for it.
  .venv/bin/python -m compileall -q controller telemetry device_agent bench
  printf '%s' "$want" > $mark
}

python_to_use() {
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "Python 3.11 or newer is needed."
  exit 1
}

missing=()
