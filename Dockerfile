# An image that trains on a TPU or GPU pod; docs/pods.md has the commands.
#
#     docker build -t diffjax .                                       # for TPUs
#     docker build -t diffjax --build-arg EXTRAS=cuda13,k8s,data,gcs .    # for GPUs
FROM python:3.12-slim

ARG EXTRAS=tpu,data,gcs
WORKDIR /diffjax
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY diffjax diffjax
COPY configs configs
COPY train.py sample.py evaluate.py ./
RUN pip install --no-cache-dir -c constraints.txt ".[plots,$EXTRAS]"

# Not through a shell, so that SIGTERM reaches the process, which then saves.
ENTRYPOINT ["python", "train.py"]
