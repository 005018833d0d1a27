#!/bin/sh
# Stands in for Python in tests/test_setup.py: makes a .venv of itself, answers for its version, and
# for pip notes the call in $CALLS and does what $PIP says.
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-c "*) echo "${VERSION:-3 11}" ;;
  "-m pip install "*) shift 3; echo "$*" >>"$CALLS"; sh -c "$PIP" ;;
esac
