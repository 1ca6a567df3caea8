# shellcheck shell=bash
# The one file to edit for your cluster; every script in slurm/ sources it, in the repository's root.
# What is exported before sbatch wins over what stands here.

# ---- Software ---------------------------------------------------------------------------------------------------------
# module purge
# module load cuda/12.8 python/3.11       # what your cluster calls them: module avail
if [ -f .venv/bin/activate ]; then        # made by: bash demo.sh --install, on the login node
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

# ---- Network ----------------------------------------------------------------------------------------------------------
# Most compute nodes have none: without these, the libraries try for minutes before they read the cache. What comes from the
# Hugging Face hub is fetched beforehand, on the login node:   hf download gpt2-large
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}

# ---- Caches -----------------------------------------------------------------------------------------------------------
# Compiled kernels are many small files that each node makes for itself: on its own disk, not in the shared home folder.
scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor-$(id -un)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton-$(id -un)}
export MPLCONFIGDIR=${MPLCONFIGDIR:-$scratch/matplotlib-$(id -un)}
# Models from the hub are large and read by all nodes: in a place that all of them see.
# export HF_HOME=/project/<group>/huggingface

# ---- Processes --------------------------------------------------------------------------------------------------------
export PYTHONUNBUFFERED=1                 # a log line is in the log when it is written
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# export NCCL_SOCKET_IFNAME=ib0           # several nodes: the fast network, if NCCL picks another
