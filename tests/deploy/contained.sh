#!/bin/sh
# Run a command as the image is run: as user 10001 without any capability, below a root that cannot
# be written to, with a /tmp of its own from which nothing can be started, as `docker run --tmpfs`
# makes it.
#
#   contained.sh PLACE PYTHON PACKAGES COMMAND...
#
# PLACE is seen as /srv; its folders `store` and `cache` can be written to. The interpreter's folder
# and the folder of the packages that are installed, which may lie where only root gets, are seen as
# /srv/python and /srv/packages.
set -eu
place=$1 python=$2 packages=$3
shift 3
mount --make-rprivate /
mount --bind "$place" /srv
mount --bind "$python" /srv/python
mount --bind "$packages" /srv/packages
for folder in store cache; do mount --bind "/srv/$folder" "/srv/$folder"; done
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs /tmp
for folder in / /srv /srv/python /srv/packages; do mount -o bind,remount,ro "$folder"; done
cd /srv/cache
exec setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --inh-caps=-all \
    --bounding-set=-all -- "$@"
