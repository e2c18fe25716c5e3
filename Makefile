.PHONY: install check test bench quickstart

install:
	pip install -e ".[test]"

check:
	ruff check .
	ruff format --check .
	typos

test:
	python -m pytest -n 2 --dist loadfile

bench:
	python benchmarks/inference.py

quickstart:
	accelerate launch training/pretrain.py
