# Sourced by demo.sh and test.sh: each has an environment of its own in the checkout. Runs in the bash 3.2 of macOS.

export PIP_DISABLE_PIP_VERSION_CHECK=1
set -o pipefail

# The first Python that is new enough and can make a virtual environment; PYTHON=… overrides.
find_python() {
  local candidate
  if [ -n "$PYTHON" ]; then
    set -- "$PYTHON"
  else
    set -- python3 python3.14 python3.13 python3.12 python3.11
  fi
  for candidate in "$@"; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: ${PYTHON:-python3} is no Python 3.11 or newer with venv and ensurepip;" \
    "install one (Debian: python3-venv) or name it with PYTHON=/path/to/python3." >&2
  return 1
}

# Makes a .venv of the checkout and installs into it; a second call finds it done.
#   $1  its folder
#   …   what pip installs
make_venv() {
  local venv="$1" python
  shift
  local stamp="$venv/.installed-$(echo "$*" | tr -c '[:alnum:]\n' _)"
  # The programs in it know the folder it was made in: a moved checkout makes its own anew. One that
  # somebody else has made has no .checkout, and stays.
  if [ "$(cat "$venv/.checkout" 2>/dev/null || echo "$PWD")" != "$PWD" ] ||
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)" || return 1
    "$python" -m venv --clear "$venv" || return 1
    echo "$PWD" >"$venv/.checkout"
  fi
  if [ ! "$stamp" -nt pyproject.toml ] || [ ! "$stamp" -nt scripts/oldest.txt ]; then
    echo "Installing $* into $venv …"
    if ! "$venv/bin/python" -m pip install --progress-bar off --no-compile "$@" 2>"$venv/.pip" | _what_pip_does; then
      cat "$venv/.pip" >&2
      echo "error: pip could not install $* into $PWD/$venv; its reason stands above." >&2
      return 1
    fi
    touch "$stamp"
  fi
}

# Shows on one line of a terminal what pip is at, in a few words, and nothing elsewhere.
_what_pip_does() {
  local line what count=0
  while IFS= read -r line; do
    case "$line" in
      Collecting\ *)
        count=$((count + 1))
        what="${line#Collecting }"
        what="package $count, ${what%%[ <>=~!;\[]*}"
        ;;
      Building\ * | Preparing\ *) what="building mlx_flashhead" ;;
      Installing\ collected\ *) what="putting $count packages in their place, half a minute or more" ;;
      *) continue ;;
    esac
    if [ -t 1 ]; then printf '\r\033[K  %.75s' "$what"; fi
  done
  if [ -t 1 ]; then printf '\r\033[K'; fi
}
