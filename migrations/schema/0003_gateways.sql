-- What the gateways know and another gateway, or the next process, must know too. A gateway
-- deletes what is older than a day; without these tables it serves all the same, and tells clients
-- that come back more than they would need. The system file
-- (migrations/broadcast_cache_invalidation_system.sql) may have run before or may run after this.

create table tidegate.gateways (
    id uuid primary key,
    started_at timestamptz not null default clock_timestamp(),
    seen_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz
);
comment on table tidegate.gateways is
    'Each gateway''s sign of life; ended_at is set by an orderly drain.';

create table tidegate.lost_sockets (
    id bigint generated always as identity primary key,
    gateway uuid not null,
    client uuid not null,
    topic text not null,
    last_data_at timestamptz not null,
    at timestamptz not null default clock_timestamp()
);
create index lost_sockets_at_idx on tidegate.lost_sockets (at);
comment on table tidegate.lost_sockets is
    'What each socket that an orderly drain closed had joined, and when it was last heard of.';

create table tidegate.recent_topics (
    topic text primary key,
    seen_at timestamptz not null default clock_timestamp()
);
create index recent_topics_seen_at_idx on tidegate.recent_topics (seen_at);
comment on table tidegate.recent_topics is
    'Topics that somebody has joined on any gateway, and when this was last known.';

do $$
declare
    owned constant text := 'tidegate.gateways, tidegate.lost_sockets, tidegate.recent_topics';
    browser name;
begin
    for browser in
        select 'public'
        union all
        select quote_ident(rolname) from pg_roles where rolname in ('anon', 'authenticated')
    loop
        execute format('revoke all on %s from %s', owned, browser);
        execute format('revoke all on sequence tidegate.lost_sockets_id_seq from %s', browser);
    end loop;
    -- An identity's sequence asks for no right of its own.
    if exists (select from pg_roles where rolname = 'tidegate') then
        execute format('grant select, insert, update, delete on %s to tidegate', owned);
    end if;
end
$$;
