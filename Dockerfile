# Images with mmrl, for training and every other command, and for serving.
#
#     docker build -t mmrl:cuda .                                   # for NVIDIA GPUs, and for CPUs, too: about 9 GB
#     docker build -t mmrl --build-arg TORCH_INDEX=URL .            # for CPUs alone, about 3 GB
#     docker build -t mmrl-serve --target serve --build-arg TORCH_INDEX=URL .
#
# URL is the package index of PyTorch's CPU builds, as PyTorch's installation page gives it.
#
#     docker run --shm-size=8g -v "$PWD":/work mmrl train --data photos
#     docker run -p 8000:8000 -e MMRL_API_KEY=… -v "$PWD":/work:ro mmrl-serve runs/photos/index --model runs/photos/encoder
#
# They run as user 10001: give it write access to what is mounted, or add --user "$(id -u):$(id -g)".

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=
ARG EXTRAS=export,search,serve,heic,tensorboard
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY pyproject.toml constraints.txt LICENSE README.md /src/
COPY mmrl /src/mmrl
WORKDIR /src
# torch and torchvision first, and of one index: a CPU-only torch does not load the CUDA build of torchvision.
RUN python -m venv /opt/venv \
    && grep -E '^(torch|torchvision)==' constraints.txt > torch.txt \
    && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim-bookworm AS mmrl
# gcc: torch.compile and Triton, if a run uses them, build kernels.
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc=4:* libc6-dev=2.* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home mmrl \
    && mkdir /work && chown mmrl /work
COPY --from=build /opt/venv /opt/venv
COPY launch /opt/mmrl/launch
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["mmrl"]
CMD ["--help"]

FROM mmrl AS serve
EXPOSE 8000
# The API answers before the encoder has warmed up, after some seconds.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["mmrl", "serve", "--host", "0.0.0.0"]
CMD ["index"]

# The default of `docker build`.
FROM mmrl
