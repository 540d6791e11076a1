#!/bin/sh
# Fetches the overlays that `cargo lab bench --peer-bin DIR` compares Weft with: benches/peers.sh DIR [--boringtun]
#
# Debian's packages are unpacked into DIR/root, and DIR gets a start script for each program. apt runs with a source list,
# state and cache of its own: nothing is installed, and the host's packages and sources stay as they are.
# BoringTun is in no suite; --boringtun has cargo build it, which takes a minute or two.
set -eu

# Written in Go: the newest suite's packages run on older systems too.
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

# fetch SUITE PACKAGE...: downloads and unpacks them.
fetch() {
    apt=$work/$1
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/packages"
    echo "deb [signed-by=$KEYRING] $MIRROR $1 main" >"$apt/sources.list"
    # A mirror may lag behind, or the clock run ahead; what is signed is what counts here.
    cat >"$apt/apt.conf" <<END
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
END
    export APT_CONFIG="$apt/apt.conf"
    shift
    (cd "$apt/packages" && apt-get -qq update && apt-get -qq download "$@")
    for package in "$apt"/packages/*.deb; do
        dpkg -x "$package" "$dir/root"
    done
}

# shellcheck disable=SC2086 # names without spaces
fetch sid $SID
# shellcheck disable=SC2086
fetch bookworm $BOOKWORM

libraries=$(find "$dir/root" -name '*.so.*' -exec dirname {} \; | sort -u | paste -sd:)
for program in $PROGRAMS; do
    file=$(find "$dir/root" -path "*bin/$program" | head -n 1)
    printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$libraries" "$file" >"$dir/$program"
    chmod +x "$dir/$program"
done

if [ "${2:-}" = --boringtun ]; then
    cargo install --quiet --locked --root "$work/boringtun" boringtun-cli
    cp "$work/boringtun/bin/boringtun-cli" "$dir/"
fi
echo "in $dir: $(cd "$dir" && find . -maxdepth 1 -type f | sed 's,./,,' | sort | paste -sd' ')"
