ARG PYTHON_TAG=3.11-slim-bookworm

FROM python:${PYTHON_TAG} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# No pip in it: nothing is installed later.
RUN python -m venv --without-pip /venv
# The dependencies first and alone: a change of the source leaves their layer in the build cache.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip --python /venv/bin/python install --requirement /tmp/requirements.txt
COPY README.md LICENSE ./
COPY fastgpt2 fastgpt2
RUN pip wheel --no-deps --wheel-dir /tmp/wheels . \
    && pip --python /venv/bin/python install --no-deps /tmp/wheels/*.whl

FROM python:${PYTHON_TAG}
# The id is fixed because files in volumes and bind mounts belong to a number. /cache exists, and belongs to it, because
# a new named volume takes over the owner of the folder that it is mounted on.
RUN useradd --uid 10001 --user-group --create-home fastgpt2 \
    && install --directory --owner=fastgpt2 --group=fastgpt2 /cache
COPY --from=builder /venv /venv
# A progress bar in a log is hundreds of lines.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    FASTGPT2_CACHE=/cache/fastgpt2 \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    HF_HUB_DISABLE_TELEMETRY=1
# By number: Kubernetes' runAsNonRoot cannot tell by a name.
USER 10001:10001
CMD ["fastgpt2", "--help"]
