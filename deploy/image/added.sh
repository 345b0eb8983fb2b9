#!/bin/sh
# added.sh BEFORE AFTER OUT: copy the files that are in AFTER and not in BEFORE to OUT/AFTER.
set -eu
before=$1 after=$2 out=$3
cd "$after"
find . -type f | while read -r file; do
    [ -e "$before/$file" ] || { mkdir -p "$out$after/$(dirname "$file")" && cp -p "$file" "$out$after/$file"; }
done
