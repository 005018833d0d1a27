# Each command first sets .venv up where that is needed: see scripts/bootstrap.py.
#   make lab PYTHON=python3.12      make .venv with this Python
#   make test ARGS="-k attention"   pass arguments on to what the command runs

COMMANDS := lab test setup lint format chapters results handout slides site doctor bench
.PHONY: help lock clean $(COMMANDS)

help:      ## show this list
	@sed -n 's/^\([a-z]*\): *## \(.*\)/  make \1	\2/p' Makefile
lab:       ## open the course in JupyterLab, at chapter 00
test:      ## lint, the library's tests and every chapter under strict nbval
setup:     ## make or mend .venv as requirements.lock says
lint:      ## ruff check and ruff format --check
format:    ## let ruff mend what it can
chapters:  ## execute chapters/source/*.py into chapters/*.ipynb
results:   ## compute the tables in results/
handout:   ## make a zip for students, without solutions, and one for teachers
slides:    ## make a lecture of every chapter, in build/slides
site:      ## make the site, in build/site
doctor:    ## check this machine and say what would mend it
bench:     ## run the scripts in benchmarks/ (the suite: attnlab bench)

# The first of these that is new enough; .venv's own comes first, so that .venv keeps it.
PYTHONS = $(if $(PYTHON),"$(PYTHON)",.venv/bin/python python3.13 python3.12 python3.11 python3 python)
$(COMMANDS):
	@found=; for python in $(PYTHONS); do \
	  "$$python" -c "" >/dev/null 2>&1 || continue; \
	  found=$$python; \
	  if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then break; fi; \
	done; \
	if [ "$$found" ]; then exec "$$found" scripts/bootstrap.py $@ $(ARGS); fi; \
	echo 'No Python runs here (tried: $(PYTHONS)). Install Python 3.11 or newer:' >&2; \
	echo '  Debian, Ubuntu: sudo apt install python3 python3-venv' >&2; \
	echo '  Fedora: sudo dnf install python3    macOS: brew install python' >&2; \
	echo 'Or name one that is here: make $@ PYTHON=/path/to/python3' >&2; \
	exit 1

lock:      ## make requirements.lock again from pyproject.toml (ARGS=--upgrade renews all)
	@command -v uv >/dev/null || { echo 'make lock needs uv: pip install uv' >&2; exit 1; }
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-annotate \
	  --no-header --no-emit-index-url --no-emit-find-links --quiet -o requirements.lock $(ARGS)

clean:     ## remove .venv and what tools leave behind; not data, runs or notebooks
	rm -rf .venv .venv.lock build *.egg-info .pytest_cache .ruff_cache .hypothesis
