#!/bin/sh
# Sourced by dracut before the root file system is checked and mounted.
# shellcheck disable=SC2154 # dracut sets root
/bin/sh /usr/share/holdfast-agent/early.sh --device "${root#block:}"
