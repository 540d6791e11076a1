#!/bin/sh
# Puts together the image's root directory: rootfs.sh ROOT WEFT WEFT_CNI PLUGINS NFT
#
# ROOT gets the programs, and the shared libraries of those that run inside it; weft-cni and the CNI project's plugins run on
# the nodes. It is what Dockerfile and image.sh have in common.
set -eu
root=$1 weft=$2 weft_cni=$3 plugins=$4 nft=$5

if ldd "$weft_cni" 2>&1 | grep -q '=>'; then
    echo "$weft_cni needs shared libraries, but nodes may have others: build it with RUSTFLAGS='-C target-feature=+crt-static' and --target" >&2
    exit 1
fi
install -D -m 755 "$weft" "$root/usr/bin/weft"
install -D -m 755 "$nft" "$root/usr/sbin/nft"
for program in "$weft_cni" "$plugins/portmap" "$plugins/bandwidth" "$plugins/loopback"; do
    install -D -m 755 "$program" "$root/usr/libexec/weft/cni/${program##*/}"
done
# `NAME => PATH (ADDRESS)`, and for the loader just its path.
ldd "$weft" "$nft" | awk '$2 == "=>" { print $3 } $1 ~ /^\// && NF == 2 { print $1 }' | grep -v ':$' | sort -u |
    while read -r library; do
        install -D -m 755 "$library" "$root$library"
    done
# Where they are mounted.
mkdir -p "$root/run/weft" "$root/var/lib/weft" "$root/etc/cni/net.d" "$root/opt/cni/bin" "$root/host/proc/sys/net"
