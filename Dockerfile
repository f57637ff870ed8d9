# The image for docs/kubernetes.yaml: docker build -t registry.example.com/keras-recipes .
# For NVIDIA GPUs: docker build --build-arg requirements=requirements-gpu.txt -t registry.example.com/keras-recipes .
FROM python:3.12-slim-bookworm
ARG requirements=requirements.txt
WORKDIR /app
# Packages first: a change of the code does not install them again. `-e .` only links the folder, which is still empty.
COPY pyproject.toml constraints.txt requirements*.txt ./
RUN mkdir common && touch common/__init__.py && \
    pip install --no-cache-dir --requirement "$requirements" --constraint constraints.txt
COPY . .
RUN useradd --uid 1000 --create-home recipes && mkdir runs && chown recipes runs
USER 1000
CMD ["python", "recipes/mnist_cnn.py"]
