# docker build -t fastgpt2 .                            numpy's OpenBLAS
# docker build -t fastgpt2:mkl --build-arg BLAS=mkl .   Intel's MKL beside it; fastgpt2 takes the faster of the two
# docker build -t fastgpt2:compact --build-arg COMPACT=yes .   LLVM beside it: compiled steps, weights of fewer bits
# docker build -t fastgpt2:otel --build-arg OTEL=yes .  OpenTelemetry beside it, for traces
ARG PYTHON_TAG=3.11.14-slim-bookworm

FROM python:${PYTHON_TAG} AS builder
ARG BLAS=openblas
ARG COMPACT=no
ARG OTEL=no
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_COMPILE=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
# Without pip: nothing is installed later.
RUN python -m venv --without-pip /venv
# The dependencies come first and alone. So a change of the source leaves their layer as it is, here and where the
# image is pulled.
COPY pyproject.toml constraints.txt ./
COPY deploy/image ./deploy/image
RUN python deploy/image/requirements.py "$BLAS" "$COMPACT" "$OTEL" > /tmp/requirements.txt \
    && pip --python /venv/bin/python install --only-binary :all: --constraint constraints.txt -r /tmp/requirements.txt \
    && sh deploy/image/prune.sh /venv
COPY README.md LICENSE ./
COPY fastgpt2 fastgpt2
# fastgpt2 goes into a tree of its own, /app/venv/..., which is laid over the other one.
RUN PIP_CONSTRAINT=/src/constraints.txt pip wheel --no-deps --wheel-dir /tmp/wheels . \
    && cp -a /venv /tmp/bare && pip --python /venv/bin/python install --no-deps /tmp/wheels/*.whl \
    && sh deploy/image/prune.sh /venv \
    && /venv/bin/python deploy/image/compile_stdlib.py /app \
    && sh deploy/image/added.sh /tmp/bare /venv /app && rm -rf /venv && mv /tmp/bare /venv

FROM python:${PYTHON_TAG}
LABEL org.opencontainers.image.title="fastgpt2" \
      org.opencontainers.image.description="GPT-2 text generation on CPUs: workers of a Redis queue, and an HTTP endpoint" \
      org.opencontainers.image.licenses="MIT"
# The user's id is fixed, because files in volumes and bind mounts belong to a number. The folders exist and belong to
# that user, because a new named volume takes over the owner of the folder on which it is mounted.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp fastgpt2 \
    && install --directory --owner=fastgpt2 --group=fastgpt2 /cache /access
COPY --from=builder /venv /venv
COPY --from=builder /app /
# Progress bars are off, because one would be hundreds of lines in a log. The file for probes lies in /tmp, the only
# place where a container with a read-only root can write.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    FASTGPT2_CACHE=/cache/fastgpt2 \
    FASTGPT2_ALIVE_FILE=/tmp/alive \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    HF_HUB_DISABLE_TELEMETRY=1
# By number: Kubernetes' runAsNonRoot cannot tell from a name that the user is not root.
USER 10001:10001
EXPOSE 8000
CMD ["fastgpt2", "--help"]
