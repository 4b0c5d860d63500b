.venv: .venv/.stamp
.venv/.stamp: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e '.[evaluation,cluster,dev]'
	touch $@
.PHONY: .venv
