# syntax=docker/dockerfile:1

FROM python:3.12-slim AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/loupe
COPY requirements.lock .
RUN /opt/loupe/bin/pip install --require-hashes -r requirements.lock

FROM python:3.12-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin loupe \
    && install -d -o loupe -g loupe /data
COPY --from=builder /opt/loupe /opt/loupe
WORKDIR /srv/loupe
COPY alembic ./alembic
COPY LICENSE ./
COPY app ./app
ENV PATH=/opt/loupe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LOUPE_HOST=0.0.0.0 \
    LOUPE_PORT=8000 \
    LOUPE_DATA_DIR=/data
USER loupe
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"LOUPE_PORT\"]}/healthz', timeout=4)"]
# The same two commands as `make run`; SIGTERM reaches the server, since it replaces the shell.
CMD ["sh", "-c", "python -m app migrate && exec python -m app serve"]
