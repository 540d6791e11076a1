#!/bin/sh
# Fetches the overlays that `cargo lab bench --peer-bin DIR` compares Weft with: benches/peers.sh DIR [--boringtun]
#
# Debian's packages are unpacked into DIR/root, and DIR gets a small start script for each program. apt runs with a source
# list, state and cache of its own: nothing is installed, and the host's packages and sources stay as they are.
set -eu

# Written in Go, so that the newest suite's packages run on older systems too.
SID="wireguard-go nebula"
# Written in C: from a suite whose C library is no newer than that of the systems in use; with the libraries they need.
BOOKWORM="fastd tinc iperf3 libcap2 libiperf0 libjson-c5 liblzo2-2 libmnl0 libsctp1 libsodium23 libssl3 libuecc0"
PROGRAMS="wireguard-go nebula nebula-cert fastd tincd iperf3"

MIRROR=${MIRROR:-http://deb.debian.org/debian}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

[ $# -ge 1 ] || { echo "usage: $0 DIR [--boringtun]" >&2; exit 2; }
[ -e $KEYRING ] || { echo "$KEYRING is missing: apt-get install debian-archive-keyring" >&2; exit 1; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# fetch SUITE PACKAGE... : downloads and unpacks them.
fetch() {
    suite=$1
    shift
    apt=$work/$suite
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/packages"
    echo "deb [signed-by=$KEYRING] $MIRROR $suite main" >"$apt/sources.list"
    # A mirror may lag behind, or the clock run ahead; what is signed is what counts here.
    set -- -qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root \
        -o Acquire::Languages=none -o Acquire::Check-Valid-Until=false -- "$@"
    options=
    while [ "$1" != -- ]; do
        options="$options $1"
        shift
    done
    shift
    # shellcheck disable=SC2086 # the options are words without spaces
    (cd "$apt/packages" && apt-get $options update && apt-get $options download "$@")
    for package in "$apt"/packages/*.deb; do
        dpkg -x "$package" "$dir/root"
    done
}

fetch sid $SID
fetch bookworm $BOOKWORM

libraries=$(find "$dir/root" -name '*.so.*' -exec dirname {} \; | sort -u | paste -sd:)
for program in $PROGRAMS; do
    file=$(find "$dir/root" -path "*bin/$program" | head -n 1)
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$file" >"$dir/$program"
    chmod +x "$dir/$program"
done

if [ "${2:-}" = --boringtun ]; then
    cargo install --quiet --locked --root "$work/boringtun" boringtun-cli
    cp "$work/boringtun/bin/boringtun-cli" "$dir/"
fi
ls "$dir"
