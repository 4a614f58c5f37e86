#!/bin/sh
# get_doctest.sh CXX DIR: makes `#include <doctest/doctest.h>` work, with DIR as a system include directory. In this order:
# the system's header, one that was fetched before, the package manager (for root on a system with apt-get), a download of
# one pinned version by curl, wget or git, whose sha256 is checked.
set -u
cxx=$1
dir=$2
version=2.4.9
sum=041dced3b82ed2d6c920977fcba16e8b9e49daaa200c81ba0ccec529a4f1fd5d

have_header() {
    echo '#include <doctest/doctest.h>' | $cxx -std=c++17 -isystem "$dir" -E -x c++ - >/dev/null 2>&1
}
have() { command -v "$1" >/dev/null 2>&1; }

have_header && exit 0

if [ "$(id -u)" = 0 ] && have apt-get; then
    echo "  install doctest-dev (apt-get)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends doctest-dev >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends doctest-dev; } >/dev/null 2>&1
    have_header && exit 0
fi

url=https://raw.githubusercontent.com/doctest/doctest/v$version/doctest/doctest.h
mkdir -p "$dir/doctest" || exit 1
new=$dir/doctest/doctest.h.new
rm -rf "$new" "$dir/clone"
fetched=
if have curl && curl -fsSL --connect-timeout 20 -o "$new" "$url"; then
    fetched=curl
elif have wget && wget -q -T 20 -O "$new" "$url"; then
    fetched=wget
elif have git && git clone -q --depth 1 --branch v$version https://github.com/doctest/doctest "$dir/clone" 2>/dev/null &&
    cp "$dir/clone/doctest/doctest.h" "$new"; then
    fetched=git
fi
rm -rf "$dir/clone"
if [ -z "$fetched" ]; then
    rm -f "$new"
    echo "doctest: not installed and not to be had from $url; install the package doctest-dev" \
        "or put doctest.h $version into $dir/doctest/" >&2
    exit 1
fi

if have sha256sum; then
    found=$(sha256sum "$new")
elif have shasum; then
    found=$(shasum -a 256 "$new")
else
    rm -f "$new"
    echo "doctest: neither sha256sum nor shasum is here to check the download" >&2
    exit 1
fi
found=${found%% *}
if [ "$found" != "$sum" ]; then
    rm -f "$new"
    echo "doctest: sha256 of $url is $found, expected $sum" >&2
    exit 1
fi
mv "$new" "$dir/doctest/doctest.h"
echo "  fetch   doctest $version ($fetched, sha256 checked)"
