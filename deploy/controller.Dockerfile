# The controller, the ingest, the API and the command line; also the simulated fleet.
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends git openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 bellwether \
    && install -d -o bellwether -g bellwether /state /repo /broker /fleet
WORKDIR /app
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY device_agent device_agent
COPY telemetry telemetry
COPY controller controller
COPY bench bench
COPY fleets fleets
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
COPY deploy/prepare.sh /usr/local/bin/bellwether-prepare
USER bellwether
ENTRYPOINT ["bellwether"]
