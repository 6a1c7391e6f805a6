"""Packaging of sar_fast (the library) and sar_kernels (its Triton kernels, torch + triton only)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "torch>=2.8",
    'triton>=3.4; platform_system == "Linux"',
    "numpy>=1.26",
    "transformers>=5.4,<6",
    "safetensors>=0.4",
    "pillow>=10.3",  # opens 16-bit grey as such
    "huggingface_hub>=1.0",
    "jinja2>=3.1",  # chat templates
    "pyyaml>=6",
    "tqdm>=4.66",
    "typer>=0.16",
    "rich>=13",
]
REPORTS = ["matplotlib>=3.8", "scikit-image>=0.24", "pandas>=2.2", "scipy>=1.15"]
TRAIN = ["accelerate>=1.10", "datasets>=4", "pyarrow>=21", "peft>=0.17"]
TRACKERS = {"wandb": ["wandb>=0.18"], "tensorboard": ["tensorboard>=2.15"]}  # --report_to
DEV = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.2", "hypothesis>=6.100", "ruff>=0.8", "pre-commit>=4"]
NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]  # tests run examples/

setup(
    name="sar_fast",
    version="0.1.0",
    description="Semantic Attention Re-weighting for multimodal LLMs at FlashAttention speed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(".", include=["sar_fast", "sar_fast.*"]) + find_packages("kernels"),
    package_dir={"sar_kernels": "kernels/sar_kernels"},
    package_data={
        "sar_fast": ["assets/miniature/*", "lab/show/templates/*", "backends/providers/*.json"],
        "sar_kernels": ["*.json"],
    },
    install_requires=CORE,
    extras_require={
        "reports": REPORTS,
        "train": TRAIN,
        **TRACKERS,
        "deepspeed": ["deepspeed>=0.17", "ninja"],
        "flash": ["flash-attn>=2.7.3"],
        "lmms-eval": ["lmms-eval>=0.7", *TRAIN],
        # Training stacks (docs/integrations.md)
        "llamafactory": ['llamafactory>=0.9.5; python_version >= "3.11"', "omegaconf>=2.3"],
        "trl": ["trl>=1.16", *TRAIN],
        "ms-swift": ["ms-swift>=4.6"],
        "axolotl": ["axolotl>=0.19", "pydantic>=2"],
        # Grounding DINO runs through transformers: groundingdino-py does not build a model beside transformers 5
        "grounding": ["segment-anything>=1.0", "torchvision"],
        "dev": [*DEV, *NOTEBOOKS, *REPORTS, *TRAIN, *(line for lines in TRACKERS.values() for line in lines)],
    },
    entry_points={
        "console_scripts": ["sar-fast = sar_fast.cli:main"],
        "lmms_eval.models": ["sar_fast = sar_fast.integrations.lmms_eval:manifests"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
