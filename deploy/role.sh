#!/bin/sh
# The role that the gateway connects as, with a password; `tidegate migrate` gives it its rights.
set -eu
psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" -v password="$GATEWAY_DATABASE_PASSWORD" <<'SQL'
create role tidegate login nosuperuser nocreatedb nocreaterole noreplication password :'password';
SQL
