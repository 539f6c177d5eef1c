# One device: the agent alone, with its three dependencies.
FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 agent && install -d -o agent -g agent /device
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY device_agent device_agent
COPY telemetry/__init__.py telemetry/__init__.py
COPY controller/__init__.py controller/__init__.py
COPY bench/__init__.py bench/__init__.py
RUN pip install --no-cache-dir .
USER agent
VOLUME /device
ENTRYPOINT ["bellwether-agent"]
CMD ["run", "--dir", "/device"]
