# grpo in a container. The CPU build of torch comes from PyTorch's CPU index, whose address is on its installation page:
#
#     docker build --target cuda -t grpo:cuda .
#     docker build --target cpu -t grpo:cpu --build-arg PIP_EXTRA_INDEX_URL=... .
#
#     docker run --rm -it grpo:cpu -m grpo.train configs/quickstart.toml
#     docker run --rm -it --gpus all -v $PWD/runs:/grpo/work/runs -v $HOME/.cache/huggingface:/root/.cache/huggingface \
#       grpo:cuda -m grpo.train configs/gsm8k.toml
#
# CUDA's libraries come with torch's wheels; the host brings the driver (580 or newer) and the NVIDIA container toolkit.

FROM python:3.12-slim-bookworm AS cuda
# gcc compiles what launches Triton's kernels; the image's Python brings its headers.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /grpo
COPY pyproject.toml README.md LICENSE requirements/cuda.txt ./
COPY grpo grpo
COPY kernels kernels
COPY rewards rewards
COPY tasks tasks
RUN pip install --no-cache-dir -c cuda.txt ".[cuda,sft,math,trackers]"
COPY configs configs
# Away from /grpo, whose folders would hide the installed package.
WORKDIR /grpo/work
RUN ln -s ../configs configs
ENTRYPOINT ["python"]
CMD ["-m", "grpo.doctor"]

FROM python:3.11-slim-bookworm AS cpu
# make sets everything up as on any machine; libnuma1 is for vLLM, gcc for reasoning-gym's one dependency in C.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends make gcc libc6-dev libnuma1 && rm -rf /var/lib/apt/lists/*
WORKDIR /grpo
COPY . .
ARG PIP_EXTRA_INDEX_URL
RUN make .venv/.installed PYTHON=python3.11
ENTRYPOINT [".venv/bin/python"]
CMD ["-m", "grpo.doctor", "--device", "cpu"]
