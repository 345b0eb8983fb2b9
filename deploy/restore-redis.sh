#!/bin/sh
# Puts a backup of Redis (`redis-cli --rdb dump.rdb`) into a folder in which a Redis with an append-only file will run:
#
#   sh deploy/restore-redis.sh dump.rdb /var/lib/redis
#
# A Redis with `appendonly yes` reads its append-only file alone, and would begin empty beside a dump.rdb. So a Redis on
# a socket loads the dump here, writes an append-only file of it, and ends. docs/operations.md tells the rest: stop the
# pool and its Redis before, and run this as the user who Redis runs as.
set -eu

[ $# = 2 ] || { echo "usage: sh $0 DUMP FOLDER" >&2; exit 2; }
dump=$1 folder=$2
server=$(command -v redis-server || command -v valkey-server) ||
	{ echo "$0: there is no redis-server and no valkey-server on the PATH" >&2; exit 1; }
cli=$(command -v redis-cli || command -v valkey-cli) ||
	{ echo "$0: there is no redis-cli and no valkey-cli on the PATH" >&2; exit 1; }
[ -r "$dump" ] || { echo "$0: $dump cannot be read" >&2; exit 1; }
[ "$(head -c 5 "$dump")" = REDIS ] || [ "$(head -c 6 "$dump")" = VALKEY ] ||
	{ echo "$0: $dump is no dump of a Redis (redis-cli --rdb)" >&2; exit 1; }
mkdir -p "$folder"
for old in appendonlydir appendonly.aof dump.rdb; do
	[ ! -e "$folder/$old" ] || { echo "$0: $folder/$old is there already: move it away first" >&2; exit 1; }
done

# A path of a socket has at most 107 bytes, so the socket has a folder of its own.
run=$(mktemp -d "${TMPDIR:-/tmp}/restore.XXXXXX")
ask() { "$cli" -s "$run/redis.sock" "$@" | tr -d '\r'; }
# What is half done is worse than nothing: it would be taken for the data.
give_up() { rm -rf "$folder/appendonlydir" "$folder/dump.rdb"; echo "$0: $1" >&2; exit 1; }
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true; rm -rf "$run"' EXIT

cp "$dump" "$folder/dump.rdb"
"$server" --port 0 --unixsocket "$run/redis.sock" --unixsocketperm 700 --dir "$folder" --dbfilename dump.rdb \
	--appendonly no --save '' > "$run/log" &
pid=$!
until [ "$(ask ping 2>/dev/null)" = PONG ]; do
	kill -0 "$pid" 2>/dev/null || give_up "the dump cannot be loaded: $(grep -v '^$' "$run/log" | tail -n 1)"
	sleep 0.1
done
keys=$(ask dbsize)
ask config set appendonly yes > "$run/said"
until ask info persistence > "$run/info" && grep -q '^aof_rewrite_in_progress:0' "$run/info" &&
	grep -q '^aof_rewrite_scheduled:0' "$run/info"; do
	sleep 0.1
done
grep -q '^aof_last_bgrewrite_status:ok' "$run/info" || give_up "the append-only file cannot be written; is the disk full?"
ask shutdown nosave > "$run/said" || true
wait "$pid" || true
rm "$folder/dump.rdb"
echo "$folder: $keys keys restored"
