-- How a person is forgotten, and what the gateway may read of the migrations themselves. The system
-- file (migrations/broadcast_cache_invalidation_system.sql) may have run before or may run after
-- this.

-- Takes a person out of everything in schema tidegate, and gives the number of rows that it has
-- changed or deleted. No invalidation is lost: a row of the history keeps its event, endpoints,
-- transaction and time, which are what a gap needs. It loses what else was told.
--
-- Run it as the owner, after the application has forgotten the person: what is written later names
-- the person again. Old versions of rows are on the disk until VACUUM.
create or replace function tidegate.forget_person(p_person uuid)
returns bigint
language plpgsql
set search_path = ''
as $$
declare
    v_person text;
    v_count bigint;
    v_all bigint;
begin
    if p_person is null then
        raise exception 'a person has an id' using errcode = 'invalid_parameter_value';
    end if;
    -- Digits alone: a payload may have the id in capitals or without hyphens.
    v_person := '%' || replace(p_person::text, '-', '') || '%';

    -- Where an endpoint itself names the person, the row becomes a pointer, which stands for
    -- everything of its event.
    update tidegate.broadcast_history h
    set endpoints = told.endpoints,
        payload = jsonb_strip_nulls(jsonb_build_object(
            'id', h.id,
            'type', h.type,
            'event_eid', h.eid,
            'endpoints', to_jsonb(told.endpoints),
            'pointer', case when told.is_pointer then true end,
            'forgotten', true
        ))::text
    from (
        select
            r.id,
            r.is_named or r.payload like '%"pointer": true%' as is_pointer,
            case
                when r.is_named
                then array['/live/event/' || r.eid, '/live/event/' || r.eid || '/media']
                else r.endpoints
            end as endpoints
        from (
            select a.*, replace(lower(a.endpoints::text), '-', '') like v_person as is_named
            from tidegate.broadcast_history a
        ) r
        where r.is_named or replace(lower(r.payload), '-', '') like v_person
    ) told
    where h.id = told.id;
    get diagnostics v_all = row_count;

    if to_regclass('tidegate.trigger_failures') is not null then
        -- What went wrong stands before the colon.
        update tidegate.trigger_failures f
        set message = split_part(f.message, ':', 1)
        where replace(lower(f.message), '-', '') like v_person;
        get diagnostics v_count = row_count;
        v_all := v_all + v_count;
    end if;

    -- Topics of the person's own.
    delete from tidegate.lost_sockets s where replace(lower(s.topic), '-', '') like v_person;
    get diagnostics v_count = row_count;
    v_all := v_all + v_count;
    delete from tidegate.recent_topics t where replace(lower(t.topic), '-', '') like v_person;
    get diagnostics v_count = row_count;
    v_all := v_all + v_count;

    -- One that holds keeps the person's tokens shut, and is deleted when its time is over.
    delete from tidegate.revocations r
    where replace(lower(r.value), '-', '') like v_person and r.until <= clock_timestamp();
    get diagnostics v_count = row_count;
    v_all := v_all + v_count;
    select count(*) into v_count
    from tidegate.revocations r where replace(lower(r.value), '-', '') like v_person;
    if v_count > 0 then
        raise notice 'revocations that name the person and hold until their time is over: %', v_count;
    end if;
    return v_all;
end
$$;
comment on function tidegate.forget_person(uuid) is
    'Takes a person out of schema tidegate, and gives the number of rows; for the owner alone.';

do $$
declare
    other name;
begin
    revoke all on function tidegate.forget_person(uuid) from public;
    for other in
        select rolname from pg_roles
        where rolname in ('anon', 'authenticated', 'service_role', 'tidegate')
    loop
        execute format('revoke all on function tidegate.forget_person(uuid) from %I', other);
    end loop;
    -- The gateway says which migrations are pending. Who runs these files by hand has no such table.
    if to_regclass('tidegate.migrations') is not null
        and exists (select from pg_roles where rolname = 'tidegate')
    then
        grant select on tidegate.migrations to tidegate;
    end if;
end
$$;
