#!/bin/sh
# Assembles the image without a registry and without a container engine: image.sh ARCHIVE
#
# ARCHIVE becomes an OCI archive, as `ctr images import`, `podman load` and `skopeo` take it. Of what it packs, WEFT_BIN_DIR
# (weft), WEFT_CNI (a static weft-cni), WEFT_PLUGIN_DIR (portmap, bandwidth, loopback of the CNI project, 1.6 or newer) and NFT
# say where it is.
# `cargo lab image ARCHIVE` builds and fetches all of it first.
set -eu
archive=$1
here=$(cd "$(dirname "$0")" && pwd)
bin=${WEFT_BIN_DIR:-$here/../target/release}
shim=${WEFT_CNI:-$bin/weft-cni}
plugins=${WEFT_PLUGIN_DIR:-/usr/lib/cni}
nft=${NFT:-$(PATH=$PATH:/usr/sbin:/sbin command -v nft)}
name=localhost/weft:${WEFT_VERSION:-$("$bin/weft" version | awk '{ print $NF }')}
case $(uname -m) in aarch64) architecture=arm64 ;; *) architecture=amd64 ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$here/rootfs.sh" "$work/root" "$bin/weft" "$shim" "$plugins" "$nft"

# The same files make the same image.
pack() { tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$1" -cf "$2" .; }
digest() { sha256sum "$1" | cut -d ' ' -f 1; }
# Moves a file to where its digest says, and prints the descriptor.
blob() {
    sum=$(digest "$1") size=$(stat -c %s "$1")
    mv "$1" "$work/oci/blobs/sha256/$sum"
    printf '{"mediaType":"%s","digest":"sha256:%s","size":%s' "$2" "$sum" "$size"
}
oci=application/vnd.oci.image

mkdir -p "$work/oci/blobs/sha256"
pack "$work/root" "$work/layer.tar"
diff_id=$(digest "$work/layer.tar")
gzip -n "$work/layer.tar"
layer=$(blob "$work/layer.tar.gz" $oci.layer.v1.tar+gzip)
cat > "$work/config" <<JSON
{"architecture":"$architecture","os":"linux",
 "config":{"Entrypoint":["/usr/bin/weft"],"Env":["PATH=/usr/sbin:/usr/bin"]},
 "rootfs":{"type":"layers","diff_ids":["sha256:$diff_id"]}}
JSON
config=$(blob "$work/config" $oci.config.v1+json)
printf '{"schemaVersion":2,"mediaType":"%s","config":%s},"layers":[%s}]}' \
    $oci.manifest.v1+json "$config" "$layer" > "$work/manifest"
manifest=$(blob "$work/manifest" $oci.manifest.v1+json)
printf '{"schemaVersion":2,"manifests":[%s,"annotations":{"io.containerd.image.name":"%s","org.opencontainers.image.ref.name":"%s"}}]}' \
    "$manifest" "$name" "${name##*:}" > "$work/oci/index.json"
printf '{"imageLayoutVersion":"1.0.0"}' > "$work/oci/oci-layout"
pack "$work/oci" "$archive"
echo "$name in $archive: $(du -h "$archive" | cut -f 1)"
