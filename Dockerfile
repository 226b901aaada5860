# contmerge with the locked versions of all packages; docs/jobs.md shows how to use it.
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install --yes --no-install-recommends make=4.3-4.1 && rm -rf /var/lib/apt/lists/*

# The packages first: they change less often than the code, and are gigabytes.
WORKDIR /opt/hf_contmerge
COPY pyproject.toml requirements.lock cpu.lock cuda.lock Makefile README.md LICENSE ./
COPY hf_contmerge hf_contmerge
COPY recipes recipes
COPY docs/recipe.md docs/recipe.md
ENV PIP_NO_CACHE_DIR=1
RUN make install

ENV PATH=/opt/hf_contmerge/.venv/bin:$PATH HF_HOME=/hf MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["contmerge"]
CMD ["--help"]
