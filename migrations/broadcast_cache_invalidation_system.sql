-- The cache invalidation system: triggers on art, votes, bids and art_media that notify
-- cache_invalidate_<EID> and global_cache_stats, and auction_winner_<EID> when an artwork is sold.
--
-- Run it as a role that owns the tables, again whenever tables or this file have changed, or to
-- enable everything after an emergency:
--
--     psql -f migrations/broadcast_cache_invalidation_system.sql
--
-- It works on both shapes of the tables (see migrations/examples/); a table that does not exist is
-- skipped with a notice. It needs no transaction of its own and may run inside one.
--
-- A write never fails because of a trigger, and hardly waits for one:
--   * Columns are read through to_jsonb(NEW) and to_jsonb(OLD): a missing column is null, no error.
--   * DECLARE has no initialisers, because their errors escape the exception handler.
--   * Every lookup and every pg_notify has a guarded block of its own, because an exception undoes
--     what its block has notified. What goes wrong is recorded in tidegate.trigger_failures.
--   * A payload that NOTIFY would refuse becomes a pointer: it invalidates the whole event.
--   * Nothing is notified while the queue is more than half full: a full queue raises at COMMIT,
--     where nothing can catch it.
--   * lock_timeout is 50 ms within the trigger.

do $$
begin
    if to_regnamespace('tidegate') is null then
        create schema tidegate;
    end if;
    -- What went wrong in a trigger. Bounded: ten rows per transaction and about 1,100 in all.
    if to_regclass('tidegate.trigger_failures') is null then
        create table tidegate.trigger_failures (
            id bigint generated always as identity primary key,
            at timestamptz not null default clock_timestamp(),
            table_name text,
            operation text,
            event_eid text,
            sqlstate text,
            message text
        );
    end if;
end
$$;
comment on table tidegate.trigger_failures is
    'What went wrong in a cache invalidation trigger, newest last; never data of the row.';

-- Functions by our names that an earlier system has left with another signature or result would
-- stay callable beside ours, or forbid to replace them.
do $$
declare
    v_function regprocedure;
begin
    for v_function in
        select p.oid::regprocedure
        from pg_catalog.pg_proc p
        where p.pronamespace = 'public'::regnamespace
            and p.proname in (
                'manual_cache_invalidation',
                'enable_cache_invalidation',
                'disable_cache_invalidation'
            )
            and (p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)) not in (
                ('manual_cache_invalidation', 'p_event_eid text, p_endpoint text DEFAULT NULL::text', 'jsonb'),
                ('enable_cache_invalidation', '', 'integer'),
                ('disable_cache_invalidation', '', 'integer')
            )
    loop
        execute format('drop function %s', v_function);
    end loop;
end
$$;

-- Remembers a failure. Keeps p_error only where it names objects and limits (SQLSTATE classes 42,
-- 53, 54, 55): in all others, such as a cast's, it quotes data of the row. So may p_eid, unless it
-- looks like an event's id.
create or replace function tidegate.record_failure(
    p_table text,
    p_operation text,
    p_eid text,
    p_sqlstate text,
    p_step text,
    p_error text default null
)
returns void
language plpgsql
set search_path = ''
as $$
declare
    v_count integer;
    v_id bigint;
begin
    -- Each row costs its transaction subtransactions, of which 64 are cheap.
    v_count := coalesce(nullif(current_setting('tidegate.failure_count', true), '')::integer, 0);
    if v_count >= 10 then
        return;
    end if;
    perform set_config('tidegate.failure_count', (v_count + 1)::text, true);

    insert into tidegate.trigger_failures (table_name, operation, event_eid, sqlstate, message)
    values (
        p_table,
        p_operation,
        case when p_eid ~ '^[A-Za-z0-9-]{1,50}$' then p_eid end,
        p_sqlstate,
        p_step || case when p_sqlstate ~ '^(42|53|54|55)' then coalesce(': ' || left(p_error, 300), '') else '' end
    )
    returning id into v_id;

    if v_id % 100 = 0 then
        delete from tidegate.trigger_failures
        where id in (
            select f.id
            from tidegate.trigger_failures f
            where f.id <= v_id - 1000
            order by f.id
            limit 200
            for update skip locked
        );
    end if;
exception
    when others then
        null; -- There is nowhere left to say so, and the write matters more.
end
$$;

-- The moment of a message. clock_timestamp() and not now(): clients drop what has the timestamp of
-- another message, and Postgres sends equal payloads of one transaction once.
create or replace function tidegate.stamp()
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_seconds numeric;
begin
    v_seconds := extract(epoch from clock_timestamp());
    return jsonb_build_object(
        'timestamp', v_seconds,
        'cache_version', floor(v_seconds * 1000)::bigint
    );
end
$$;

-- What a row of one of the four tables means to the viewers of its event: the message without its
-- stamp, or null where the row belongs to no event.
create or replace function tidegate.describe_change(p_table text, p_operation text, p_row jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_uuid text;
    v_reference text;
    v_artwork jsonb;
    v_event_id text;
    v_eid text;
    v_failed boolean;
    v_event text;
    v_round text;
    v_easel text;
    v_message jsonb;
begin
    v_uuid := '^[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}$';
    v_failed := false;
    v_eid := nullif(p_row ->> 'eid', '');

    -- The artwork, where the row itself does not say all that is needed of it.
    if p_table = 'art' then
        v_artwork := p_row;
    else
        v_reference := coalesce(p_row ->> 'art_uuid', p_row ->> 'art_id', p_row ->> 'artwork_id');
        if v_reference is not null
            and (
                (v_eid is null and p_row ->> 'event_id' is null)
                or p_table <> 'art_media'
                and (p_row ->> 'round' is null or p_row ->> 'easel' is null or v_reference !~ v_uuid)
            )
        then
            begin
                if v_reference ~ v_uuid then
                    select to_jsonb(a) into v_artwork
                    from public.art a where a.id = v_reference::uuid;
                else
                    select to_jsonb(a) into v_artwork
                    from public.art a where a.art_code = v_reference limit 1;
                end if;
            exception
                when others then
                    v_failed := true;
                    perform tidegate.record_failure(
                        p_table, p_operation, v_eid, sqlstate, 'looking up the artwork', sqlerrm);
            end;
        end if;
    end if;

    -- The event: as the row says, else as its artwork says.
    foreach v_event_id in array array[p_row ->> 'event_id', v_artwork ->> 'event_id'] loop
        exit when v_eid is not null;
        continue when v_event_id is null;
        begin
            select e.eid into v_eid from public.events e where e.id = v_event_id::uuid;
        exception
            when others then
                v_failed := true;
                perform tidegate.record_failure(
                    p_table, p_operation, null, sqlstate, 'looking up the event', sqlerrm);
        end;
    end loop;
    if v_eid is null then
        -- A row without any reference, or whose artwork has no event, concerns nobody. One whose
        -- reference leads nowhere is a change that some viewer is not told of.
        if not v_failed
            and (
                p_row ->> 'event_id' is not null
                or v_artwork ->> 'event_id' is not null
                or (v_reference is not null and v_artwork is null)
            )
        then
            perform tidegate.record_failure(
                p_table, p_operation, null, 'P0002', 'the event of the row was not found');
        end if;
        return null;
    end if;
    -- A channel's name has at most 63 bytes, of which cache_invalidate_ takes 17.
    if v_eid !~ '^[A-Za-z0-9-]{1,46}$' then
        perform tidegate.record_failure(
            p_table, p_operation, v_eid, '22023',
            'no channel can be named after this event: 1 to 46 letters, digits and hyphens');
        return null;
    end if;

    v_event := '/live/event/' || v_eid;
    v_round := coalesce(p_row ->> 'round', v_artwork ->> 'round');
    v_easel := coalesce(p_row ->> 'easel', v_artwork ->> 'easel');
    v_message := jsonb_build_object(
        'event_eid', v_eid,
        'art_id', coalesce(v_artwork ->> 'id', v_reference)
    );
    if p_table = 'art_media' then
        if p_row ? 'artwork_id' then
            v_message := v_message || jsonb_build_object('artwork_id', p_row ->> 'artwork_id');
        end if;
        return v_message || jsonb_build_object(
            'type', 'media_updated', 'endpoints', jsonb_build_array(v_event || '/media'));
    end if;
    v_message := v_message || jsonb_build_object(
        'round', coalesce(nullif(p_row -> 'round', 'null'), v_artwork -> 'round'),
        'easel', v_easel
    );
    if p_table = 'votes' then
        return v_message || jsonb_build_object(
            'type', 'vote_cast', 'endpoints', jsonb_build_array(v_event));
    elsif p_table = 'bids' then
        return v_message || jsonb_build_object(
            'type', 'bid_placed',
            -- Without a round or an easel the second is null, and null is no endpoint.
            'endpoints', to_jsonb(array_remove(
                array[v_event, v_event || '-' || nullif(v_round, '') || '-' || nullif(v_easel, '') || '/bids'],
                null)),
            'amount', p_row -> 'amount');
    end if;
    return v_message || jsonb_build_object(
        'type', 'art_updated', 'endpoints', jsonb_build_array(v_event, v_event || '/media'));
end
$$;

-- What the viewers of an event learn when an artwork becomes sold, without its stamp. Who won
-- stands in the artwork, else it is the highest bidder.
create or replace function tidegate.describe_sale(p_old jsonb, p_new jsonb, p_eid text)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_bid jsonb;
    v_winner text;
    v_nickname text;
begin
    v_winner := p_new ->> 'winner_id';
    begin
        if to_regclass('public.bids') is not null then
            select to_jsonb(b) into v_bid
            from public.bids b
            where b.art_id = (p_new ->> 'id')::uuid
                and (v_winner is null or to_jsonb(b) ->> 'person_id' = v_winner)
            order by b.amount desc nulls last
            limit 1;
            v_winner := coalesce(v_winner, v_bid ->> 'person_id');
        end if;
    exception
        when others then
            perform tidegate.record_failure(
                'art', 'UPDATE', p_eid, sqlstate, 'looking up the winning bid', sqlerrm);
    end;
    begin
        if v_winner is not null and to_regclass('public.people') is not null then
            select to_jsonb(p) ->> 'nickname' into v_nickname
            from public.people p where p.id = v_winner::uuid;
        end if;
    exception
        when others then
            perform tidegate.record_failure(
                'art', 'UPDATE', p_eid, sqlstate, 'looking up the winner', sqlerrm);
    end;
    return jsonb_build_object(
        'type', 'auction_status_change',
        'event_eid', p_eid,
        'art_id', p_new ->> 'id',
        'art_code', p_new ->> 'art_code',
        'old_status', p_old ->> 'status',
        'new_status', p_new ->> 'status',
        'is_winning_bidder', v_winner is not null,
        'winning_amount', coalesce(nullif(p_new -> 'current_bid', 'null'), v_bid -> 'amount'),
        'currency', coalesce(p_new ->> 'currency', v_bid ->> 'currency_code'),
        'winner_person_id', v_winner,
        'winner_nickname', v_nickname
    );
end
$$;

-- Notifies, or records why not. Never raises.
create or replace function tidegate.send(
    p_table text,
    p_operation text,
    p_eid text,
    p_channel text,
    p_payload jsonb
)
returns void
language plpgsql
set search_path = ''
as $$
begin
    if pg_catalog.pg_notification_queue_usage() > 0.5 then
        perform tidegate.record_failure(
            p_table, p_operation, p_eid, '53000', 'the notification queue is more than half full');
        return;
    end if;
    perform pg_catalog.pg_notify(p_channel, p_payload::text);
exception
    when others then
        perform tidegate.record_failure(
            p_table, p_operation, p_eid, sqlstate, 'notifying', sqlerrm);
end
$$;

-- Tells an event's viewers and the monitoring channel what describe_change() found, if anything.
create or replace function tidegate.publish(p_table text, p_operation text, p_message jsonb)
returns void
language plpgsql
set search_path = ''
as $$
declare
    v_eid text;
    v_event text;
    v_payload jsonb;
begin
    if p_message is null then
        return;
    end if;
    v_eid := p_message ->> 'event_eid';

    v_payload := p_message || tidegate.stamp();
    if octet_length(v_payload::text) >= 8000 then
        perform tidegate.record_failure(
            p_table, p_operation, v_eid, '22023',
            'a payload of ' || octet_length(v_payload::text) || ' bytes was replaced by a pointer');
        v_event := '/live/event/' || v_eid;
        v_payload := jsonb_build_object(
            'type', p_message -> 'type',
            'event_eid', v_eid,
            'endpoints', jsonb_build_array(v_event, v_event || '/media'),
            'pointer', true
        ) || tidegate.stamp();
    end if;
    perform tidegate.send(p_table, p_operation, v_eid, 'cache_invalidate_' || v_eid, v_payload);

    perform tidegate.send(
        p_table, p_operation, v_eid, 'global_cache_stats',
        jsonb_build_object('event_eid', v_eid, 'table', p_table, 'operation', p_operation)
            || tidegate.stamp() - 'cache_version');
end
$$;

-- The trigger of all four tables.
create or replace function tidegate.cache_invalidation()
returns trigger
language plpgsql
security definer
set search_path = ''
set lock_timeout = '50ms'
as $$
declare
    v_old jsonb;
    v_new jsonb;
    v_message jsonb;
    v_former jsonb;
    v_sale jsonb;
begin
    begin
        if tg_op <> 'INSERT' then
            v_old := to_jsonb(old);
        end if;
        if tg_op <> 'DELETE' then
            v_new := to_jsonb(new);
        end if;
        v_message := tidegate.describe_change(tg_table_name, tg_op, coalesce(v_new, v_old));

        -- A row that moved concerns the viewers of the place that it left, too.
        if tg_op = 'UPDATE' and exists (
            select from unnest(array['eid', 'event_id', 'art_uuid', 'art_id', 'artwork_id']) as k
            where v_old -> k is distinct from v_new -> k
        ) then
            v_former := tidegate.describe_change(tg_table_name, tg_op, v_old);
            if v_former -> 'event_eid' = v_message -> 'event_eid' then
                select jsonb_set(v_message, '{endpoints}', jsonb_agg(endpoint order by first))
                into v_message
                from (
                    select endpoint, min(place) as first
                    from jsonb_array_elements((v_message -> 'endpoints') || (v_former -> 'endpoints'))
                        with ordinality as both_places (endpoint, place)
                    group by endpoint
                ) as endpoints;
                v_former := null;
            end if;
        end if;

        if tg_table_name = 'art' and tg_op = 'UPDATE' and v_message is not null
            and v_new ->> 'status' = 'sold' and v_old ->> 'status' is distinct from 'sold'
        then
            v_sale := tidegate.describe_sale(v_old, v_new, v_message ->> 'event_eid');
        end if;
    exception
        when others then
            perform tidegate.record_failure(
                tg_table_name, tg_op, null, sqlstate, 'describing the change', sqlerrm);
    end;

    perform tidegate.publish(tg_table_name, tg_op, v_message);
    perform tidegate.publish(tg_table_name, tg_op, v_former);
    if v_sale is not null then
        perform tidegate.send(
            tg_table_name, tg_op, v_sale ->> 'event_eid',
            'auction_winner_' || (v_sale ->> 'event_eid'),
            v_sale || tidegate.stamp() - 'cache_version');
    end if;
    return null;
exception
    -- The functions above catch what is theirs; this catches that one of them is missing.
    when others then
        begin
            perform tidegate.record_failure(
                tg_table_name, tg_op, null, sqlstate, 'publishing the change', sqlerrm);
        exception
            when others then
                null;
        end;
        return null;
end
$$;

-- Every endpoint of an event: main, media, artists, and the bids of each artwork.
create or replace function tidegate.event_endpoints(p_eid text)
returns setof text
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
    if p_eid is null or p_eid !~ '^[A-Za-z0-9-]{1,50}$' then
        return;
    end if;
    return next '/live/event/' || p_eid;
    return next '/live/event/' || p_eid || '/media';
    return next '/live/event/' || p_eid || '/artists';
    return query
    select '/live/event/' || p_eid || '-' || artwork.round || '-' || artwork.easel || '/bids'
    from (
        select distinct to_jsonb(a) ->> 'round' as round, to_jsonb(a) ->> 'easel' as easel
        from public.art a
        join public.events e on e.id = a.event_id
        where e.eid = p_eid
    ) as artwork
    where artwork.round <> '' and artwork.easel <> ''
    order by artwork.round, artwork.easel;
exception
    when undefined_table or undefined_column then
        raise warning 'the artworks of % cannot be read: %', p_eid, sqlerrm;
end
$$;

-- Invalidates one endpoint of an event, or the event and its media, and gives the payload sent.
create or replace function public.manual_cache_invalidation(
    p_event_eid text,
    p_endpoint text default null
)
returns jsonb
language plpgsql
security definer
set search_path = ''
as $$
declare
    v_event text;
    v_payload jsonb;
begin
    if p_event_eid is null or p_event_eid !~ '^[A-Za-z0-9-]{1,46}$' then
        raise exception 'an event id has 1 to 46 letters, digits and hyphens'
            using errcode = 'invalid_parameter_value';
    end if;
    if pg_catalog.pg_notification_queue_usage() > 0.5 then
        raise exception 'the notification queue is more than half full'
            using errcode = 'insufficient_resources';
    end if;
    v_event := '/live/event/' || p_event_eid;
    v_payload := jsonb_build_object(
        'type', 'manual_invalidation',
        'event_eid', p_event_eid,
        'endpoints', case
            when p_endpoint is null then jsonb_build_array(v_event, v_event || '/media')
            else jsonb_build_array(p_endpoint)
        end
    ) || tidegate.stamp();
    perform pg_catalog.pg_notify('cache_invalidate_' || p_event_eid, v_payload::text);
    perform pg_catalog.pg_notify(
        'global_cache_stats',
        (
            jsonb_build_object('event_eid', p_event_eid, 'table', 'manual', 'operation', 'MANUAL')
                || tidegate.stamp() - 'cache_version'
        )::text);
    return v_payload;
end
$$;

-- Makes and enables the triggers, and gives their number. A table that does not exist is skipped
-- with a notice; a trigger that is already right is left alone, so that nothing is locked.
create or replace function public.enable_cache_invalidation()
returns integer
language plpgsql
security invoker
set search_path = ''
-- Making a trigger waits for the writers of its table while new writers wait behind it.
set lock_timeout = '5s'
as $$
declare
    v_table text;
    v_trigger text;
    v_events text;
    v_definition text;
    v_state "char";
    v_count integer;
begin
    v_count := 0;
    for v_table, v_trigger, v_events in
        values
            ('art', 'cache_invalidate_art_trigger', 'INSERT OR UPDATE'),
            ('votes', 'cache_invalidate_votes_trigger', 'INSERT OR DELETE OR UPDATE'),
            ('bids', 'cache_invalidate_bids_trigger', 'INSERT OR UPDATE'),
            ('art_media', 'cache_invalidate_media_trigger', 'INSERT OR DELETE OR UPDATE')
    loop
        if not exists (
            select from pg_catalog.pg_class c
            where c.oid = to_regclass('public.' || v_table) and c.relkind in ('r', 'p')
        ) then
            raise notice 'table public.% does not exist: its cache invalidation is skipped', v_table;
            continue;
        end if;
        -- As pg_get_triggerdef() would print it.
        v_definition := format(
            'CREATE TRIGGER %I AFTER %s ON public.%I FOR EACH ROW EXECUTE FUNCTION tidegate.cache_invalidation()',
            v_trigger, v_events, v_table);
        v_state := null;
        select t.tgenabled into v_state
        from pg_catalog.pg_trigger t
        where t.tgrelid = to_regclass('public.' || v_table)
            and t.tgname = v_trigger
            and pg_get_triggerdef(t.oid) = v_definition;
        if v_state is null then
            if exists (
                select from pg_catalog.pg_trigger t
                where t.tgrelid = to_regclass('public.' || v_table) and t.tgname = v_trigger
            ) then
                execute format('drop trigger %I on public.%I', v_trigger, v_table);
            end if;
            execute v_definition;
        elsif v_state in ('D', 'R') then
            execute format('alter table public.%I enable trigger %I', v_table, v_trigger);
        end if;
        v_count := v_count + 1;
    end loop;
    return v_count;
end
$$;

-- Disables the triggers until enable_cache_invalidation(), and gives their number.
create or replace function public.disable_cache_invalidation()
returns integer
language plpgsql
security invoker
set search_path = ''
set lock_timeout = '5s'
as $$
declare
    v_table regclass;
    v_trigger text;
    v_count integer;
begin
    v_count := 0;
    for v_table, v_trigger in
        select t.tgrelid::regclass, t.tgname
        from pg_catalog.pg_trigger t
        where t.tgfoid = 'tidegate.cache_invalidation'::regproc and t.tgparentid = 0
    loop
        execute format('alter table %s disable trigger %I', v_table, v_trigger);
        v_count := v_count + 1;
    end loop;
    return v_count;
end
$$;

-- Closes everything of ours to browsers and opens to the gateway and to server code what they need.
-- PostgREST shows the schema public to browsers, and Supabase grants them every new function there.
create or replace function tidegate.grant_access()
returns void
language plpgsql
security invoker
set search_path = ''
as $$
declare
    v_function regprocedure;
    v_role text;
begin
    revoke all on schema tidegate from public;
    revoke all on all tables in schema tidegate from public;
    for v_role in
        select quote_ident(r.rolname) from pg_catalog.pg_roles r
        where r.rolname in ('anon', 'authenticated')
    loop
        execute format('revoke all on schema tidegate from %s', v_role);
        execute format('revoke all on all tables in schema tidegate from %s', v_role);
    end loop;
    for v_function, v_role in
        select p.oid::regprocedure, browsers.name
        from pg_catalog.pg_proc p
        cross join (
            select 'public' as name
            union all
            select quote_ident(r.rolname) from pg_catalog.pg_roles r
            where r.rolname in ('anon', 'authenticated')
        ) as browsers
        where pg_has_role(p.proowner, 'USAGE') and (
            p.pronamespace = 'tidegate'::regnamespace
            or p.pronamespace = 'public'::regnamespace and p.proname in (
                'manual_cache_invalidation',
                'enable_cache_invalidation',
                'disable_cache_invalidation'
            )
        )
    loop
        execute format('revoke all on function %s from %s', v_function, v_role);
    end loop;

    for v_role in
        select r.rolname from pg_catalog.pg_roles r where r.rolname in ('service_role', 'tidegate')
    loop
        execute format(
            'grant execute on function public.manual_cache_invalidation(text, text) to %I', v_role);
    end loop;
    if exists (select from pg_catalog.pg_roles where rolname = 'tidegate') then
        grant usage on schema tidegate to tidegate;
        grant select, delete on tidegate.trigger_failures to tidegate;
        grant execute on function tidegate.event_endpoints(text) to tidegate;
    end if;
end
$$;

do $$
begin
    perform tidegate.grant_access();
    perform public.enable_cache_invalidation();
end
$$;
