-- What Supabase's Realtime makes in a project: its roles, its table with a partition for each day,
-- its grants. `project` is the role that the owner of a project has: no superuser.
--
-- Source: supabase/realtime, lib/realtime/tenants/repo/migrations.

create role anon nologin;
create role authenticated nologin;
create role service_role nologin bypassrls;
create role supabase_realtime_admin noinherit login createrole replication;
create role project login createrole bypassrls;
grant anon, authenticated, service_role to supabase_realtime_admin;
grant anon, authenticated, service_role to project with admin option;
grant create on schema public to project;
do $$ begin execute format('grant all on database %I to project', current_database()); end $$;

create schema realtime;
grant usage on schema realtime to project, anon, authenticated, service_role;
grant all on schema realtime to supabase_realtime_admin with grant option;

create table realtime.messages (
    topic text not null,
    extension text not null,
    payload jsonb,
    event text,
    private boolean default false,
    updated_at timestamp not null default now(),
    inserted_at timestamp not null default now(),
    id uuid not null default gen_random_uuid(),
    binary_payload bytea,
    primary key (id, inserted_at),
    constraint messages_payload_exclusive check (payload is null or binary_payload is null)
) partition by range (inserted_at);
alter table realtime.messages enable row level security;
alter table realtime.messages owner to supabase_realtime_admin;
grant select, insert, update on realtime.messages to anon, authenticated, service_role;
do $$
begin
    for day in -1 .. 3 loop
        execute format(
            'create table realtime.%I partition of realtime.messages for values from (%L) to (%L)',
            to_char(current_date + day, '"messages_"YYYY_MM_DD'), current_date + day,
            current_date + day + 1);
    end loop;
end
$$;

create function realtime.topic() returns text language sql stable
    as $$ select nullif(current_setting('realtime.topic', true), '')::text $$;
alter function realtime.topic() owner to supabase_realtime_admin;
