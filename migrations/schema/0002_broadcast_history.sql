-- What the viewers of each event were told, written by the triggers in the transaction that made
-- the change. The system file (migrations/broadcast_cache_invalidation_system.sql) may have run
-- before or may run after this: what both need, both make.

do $$
declare
    browser name;
begin
    if to_regclass('tidegate.broadcast_history') is null then
        create table tidegate.broadcast_history (
            id bigint generated always as identity primary key,
            eid text not null,
            type text,
            table_name text,
            operation text,
            endpoints text[] not null,
            payload text not null,
            xact xid8 not null default pg_current_xact_id(),
            at timestamptz not null default clock_timestamp()
        );
        create index broadcast_history_xact_idx on tidegate.broadcast_history (xact);
        create index broadcast_history_eid_at_idx on tidegate.broadcast_history (eid, at);
        create index broadcast_history_at_idx on tidegate.broadcast_history (at);
    end if;

    for browser in
        select 'public'
        union all
        select quote_ident(rolname) from pg_roles where rolname in ('anon', 'authenticated')
    loop
        execute format('revoke all on tidegate.broadcast_history from %s', browser);
        execute format('revoke all on sequence tidegate.broadcast_history_id_seq from %s', browser);
    end loop;
    if exists (select from pg_roles where rolname = 'tidegate') then
        grant select, delete on tidegate.broadcast_history to tidegate;
    end if;
end
$$;
