# The container of remote steps (compute.remote.image): the packages that constraints.txt pins, and nothing of this repository.
# Code, params and inputs travel with every step, so one image serves every commit until the constraints change.
#
#   docker build -t registry.example/unigrpo:1 . && docker push registry.example/unigrpo:1
#
# CUDA comes with torch's own packages; machines need NVIDIA's driver and container runtime. ~9 GB with them.
FROM python:3.11-slim-bookworm

# torch compiles attention kernels with the system's compiler when it is asked to.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/unigrpo
COPY constraints.txt pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; e = p["optional-dependencies"]; print(*p["dependencies"], *e["evaluation"], *e["cluster"], sep="\n")' > requirements.txt \
 && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt

# Metaflow unpacks the code into a folder below the working directory.
RUN useradd --create-home --uid 1000 unigrpo
USER unigrpo
WORKDIR /home/unigrpo
ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true
