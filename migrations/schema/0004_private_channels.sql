-- Private channels: what the gateway needs to ask Postgres who may read and write them, which the
-- policies of row-level security on realtime.messages decide. It may run again and again, with and
-- without the roles anon, authenticated and service_role; after roles were made,
-- tidegate.open_private_channels() alone will do, and so will the system file, which calls it.
--
-- Where Supabase's own realtime.messages is, nothing of it is touched. Elsewhere a schema realtime
-- is made with the same table, in which the gateway never leaves a row: it asks in transactions
-- that roll back.

do $$
declare
    made constant text := 'Made by Tidegate for private channels.';
begin
    if to_regnamespace('tidegate') is null then
        create schema tidegate;
    end if;

    if to_regnamespace('realtime') is null then
        create schema realtime;
        -- By this migrations/uninstall.sql knows it.
        execute format('comment on schema realtime is %L', made);
    end if;
    if obj_description(to_regnamespace('realtime'), 'pg_namespace') is distinct from made then
        if to_regclass('realtime.messages') is null then
            raise notice 'schema realtime is not ours and lacks messages: private channels are unavailable';
        end if;
        return;
    end if;

    if to_regclass('realtime.messages') is null then
        -- As Supabase's, so that the same policies work.
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
        create table realtime.messages_default partition of realtime.messages default;
        create index messages_inserted_at_topic_index
            on realtime.messages (inserted_at desc, topic)
            where extension = 'broadcast' and private;
        -- Without a policy nobody may anything.
        alter table realtime.messages enable row level security;
        alter table realtime.messages_default enable row level security;
        comment on table realtime.messages is
            'Its policies decide about private channels: select to read them, insert to write.';
    end if;
    execute $topic$
        create or replace function realtime.topic()
        returns text
        language sql
        stable
        set search_path = ''
        as $body$ select nullif(current_setting('realtime.topic', true), '') $body$
    $topic$;
end
$$;

-- Inserts what the policies are asked about: rows of a topic and an extension and nothing else. It
-- is the gateway's only way to write to realtime.messages as its owner.
create or replace function tidegate.insert_probes(p_topic text, p_extensions text[])
returns table (probe_extension text, probe_id uuid)
language plpgsql
volatile
security definer
set search_path = ''
as $$
begin
    return query
        insert into realtime.messages (topic, extension)
        select p_topic, e.extension
        from (values ('broadcast'), ('presence')) as e (extension)
        where e.extension = any (p_extensions)
        returning extension, id;
end
$$;
revoke all on function tidegate.insert_probes(text, text[]) from public;

-- Lets the gateway ask in the name of anon and authenticated, and opens a schema realtime of ours
-- to those whom Supabase opens its own to. Run it as the role that ran the migrations.
create or replace function tidegate.open_private_channels()
returns void
language plpgsql
security invoker
set search_path = ''
as $$
declare
    v_is_ours constant boolean :=
        obj_description(to_regnamespace('realtime'), 'pg_namespace')
            is not distinct from 'Made by Tidegate for private channels.';
    v_role text;
begin
    for v_role in
        select r.rolname from pg_catalog.pg_roles r
        where r.rolname in ('anon', 'authenticated', 'service_role')
    loop
        if v_is_ours then
            execute format('grant usage on schema realtime to %I', v_role);
            execute format('grant select, insert, update on realtime.messages to %I', v_role);
        end if;
        execute format(
            'revoke all on function tidegate.insert_probes(text, text[]), '
                'tidegate.open_private_channels() from %I',
            v_role);
    end loop;
    if not exists (select from pg_catalog.pg_roles where rolname = 'tidegate') then
        return;
    end if;

    grant execute on function tidegate.insert_probes(text, text[]) to tidegate;
    -- All of it or nothing: a member that inherits would have the rights of anon and authenticated
    -- all the time, and not only while it asks in their name.
    begin
        if exists (select from pg_catalog.pg_roles where rolname = 'tidegate' and rolinherit) then
            alter role tidegate noinherit;
        end if;
        for v_role in
            select r.rolname from pg_catalog.pg_roles r
            where r.rolname in ('anon', 'authenticated')
                and not pg_has_role('tidegate', r.oid, 'member')
        loop
            execute format('grant %I to tidegate', v_role);
        end loop;
    exception
        when insufficient_privilege then
            raise notice 'private channels are unavailable, % may not: alter role tidegate noinherit; grant anon, authenticated to tidegate',
                current_user;
    end;
end
$$;
revoke all on function tidegate.open_private_channels() from public;

do $$
begin
    perform tidegate.open_private_channels();
end
$$;
