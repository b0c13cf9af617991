#!/bin/sh
# Install Debian's SLURM where that is allowed and possible, otherwise say why not; never an error.
set -u
command -v slurmctld >/dev/null && command -v munged >/dev/null && exit 0
if [ "$(id -u)" != 0 ]; then
  echo "SLURM is not installed, and only root may install it: its tests will be skipped"
elif ! command -v apt-get >/dev/null; then
  echo "SLURM is not installed, and there is no apt-get here: its tests will be skipped"
elif ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; }; then
  echo "SLURM could not be installed (see above): its tests will be skipped"
fi
