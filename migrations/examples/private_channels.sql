-- An example of who may read and write private channels: rooms, whose members read and write them,
-- announcements, which all users read, and a stage on which the role of the token decides. It is
-- for a Postgres of one's own: on Supabase the roles and schema auth are there, and only the
-- policies are wanted. Run `tidegate migrate` first.
--
--     psql -f migrations/examples/private_channels.sql

do $$
begin
    if not exists (select from pg_roles where rolname = 'anon') then
        create role anon nologin;
    end if;
    if not exists (select from pg_roles where rolname = 'authenticated') then
        create role authenticated nologin;
    end if;
    -- Policies do not bind server code.
    if not exists (select from pg_roles where rolname = 'service_role') then
        create role service_role nologin bypassrls;
    end if;
    if to_regprocedure('tidegate.open_private_channels()') is not null then
        perform tidegate.open_private_channels();
    end if;
end
$$;

-- What policies ask the token, as Supabase defines it.
create schema if not exists auth;
grant usage on schema auth to anon, authenticated, service_role;

create or replace function auth.uid()
returns uuid
language sql
stable
as $$
    select coalesce(
        nullif(current_setting('request.jwt.claim.sub', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
    )::uuid
$$;

create or replace function auth.role()
returns text
language sql
stable
as $$
    select coalesce(
        nullif(current_setting('request.jwt.claim.role', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
    )
$$;

create or replace function auth.jwt()
returns jsonb
language sql
stable
as $$
    select coalesce(
        nullif(current_setting('request.jwt.claim', true), ''),
        nullif(current_setting('request.jwt.claims', true), '')
    )::jsonb
$$;

-- Who is in which room.
create table if not exists public.room_members (
    topic text not null,
    user_id uuid not null,
    may_write boolean not null default true,
    primary key (topic, user_id)
);
alter table public.room_members enable row level security;
grant select on public.room_members to authenticated;
drop policy if exists "members see themselves" on public.room_members;
create policy "members see themselves" on public.room_members
    for select to authenticated
    using (user_id = (select auth.uid()));

drop policy if exists "members read their rooms" on realtime.messages;
create policy "members read their rooms" on realtime.messages
    for select to authenticated
    using (
        extension in ('broadcast', 'presence') and exists (
            select from public.room_members m
            where m.topic = (select realtime.topic()) and m.user_id = (select auth.uid())
        )
    );

drop policy if exists "members write to their rooms" on realtime.messages;
create policy "members write to their rooms" on realtime.messages
    for insert to authenticated
    with check (
        extension = 'broadcast' and exists (
            select from public.room_members m
            where m.topic = (select realtime.topic()) and m.user_id = (select auth.uid())
                and m.may_write
        )
    );

drop policy if exists "users read announcements" on realtime.messages;
create policy "users read announcements" on realtime.messages
    for select to authenticated
    using (extension = 'broadcast' and (select realtime.topic()) = 'announcements');

drop policy if exists "performers have the stage" on realtime.messages;
create policy "performers have the stage" on realtime.messages
    to authenticated
    using (
        (select realtime.topic()) like 'stage:%'
        and (select auth.jwt()) ->> 'user_role' in ('performer', 'audience')
    )
    with check (
        (select realtime.topic()) like 'stage:%'
        and (select auth.jwt()) ->> 'user_role' = 'performer'
    );
