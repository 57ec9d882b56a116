# The image that the CronJob runs: docker build --tag epok .
# BASE can be any image with Python 3.11 or newer and pip.
ARG BASE=python:3.14-slim

FROM ${BASE} AS build
# The official Python image has no byte code of the standard library, and a container that may not write would compile
# what it imports in each run. So all byte code has a folder of its own, which this image brings along.
ENV PYTHONPYCACHEPREFIX=/epok/byte-code PYTHONDONTWRITEBYTECODE=1
COPY requirements.txt /
RUN python3 -m pip install --no-cache-dir --no-compile --require-hashes --target /epok -r /requirements.txt
# kubernetes/aio is the same client once more, for asyncio: a third of all files.
RUN rm -r /epok/bin /epok/kubernetes/aio
COPY epok.py /epok/
# Unchecked: whatever times the files get on their way here and to the registry, their byte code stays good.
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -x "/tests?/" /epok \
    "$(python3 -c "import sysconfig; print(sysconfig.get_path('stdlib'))")"

FROM ${BASE}
ARG VERSION=1.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="epok" \
    org.opencontainers.image.description="Kubernetes Services on ports of a host: swaps iptables rules over SSH" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
COPY --from=build /epok /epok
ENV PYTHONPATH=/epok PYTHONPYCACHEPREFIX=/epok/byte-code PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
# As a module, since the byte code of a script is not kept. -S and -P: nothing but /epok and the standard library.
ENTRYPOINT ["python3", "-S", "-P", "-m", "epok"]
