#!/bin/sh
# Sourced by dracut before the root is switched to.
/bin/sh /usr/share/holdfast-agent/early.sh "${NEWROOT:-/sysroot}"
