-- The cache invalidation system: triggers on art, votes, bids, art_media, event_artists,
-- round_contestants, artwork_offers, payment_processing and events that notify
-- cache_invalidate_<EID> and global_cache_stats, and auction_winner_<EID> when an artwork is sold.
-- What cache_invalidate_<EID> is notified of stands in tidegate.broadcast_history, too, written by
-- the same transaction.
--
-- Run it as a role that owns the tables, again whenever tables or this file have changed, or to
-- enable everything after an emergency:
--
--     psql -f migrations/broadcast_cache_invalidation_system.sql
--
-- It works on both shapes of the tables (see migrations/examples/); a table that does not exist is
-- skipped with a notice. It needs no transaction of its own and may run inside one; two at once may
-- fail with `tuple concurrently updated`, which `tidegate migrate` waits out.
--
-- A write never fails because of a trigger, and hardly waits for one:
--   * Columns are read by name beside a row of nulls that has the same names: a missing column is
--     null, no error, and a large one that is not needed is not fetched.
--   * DECLARE has no initialisers, because their errors escape the exception handler.
--   * Every lookup, every pg_notify and every row of the history has a guarded block of its own,
--     because an exception undoes what its block has done. What goes wrong is recorded in
--     tidegate.trigger_failures.
--   * A payload that NOTIFY would refuse becomes a pointer: it invalidates the whole event.
--   * Nothing is notified while the queue is more than half full: a full queue raises at COMMIT,
--     where nothing can catch it. The history is written even then.
--   * A transaction tells at most 50 messages, then one pointer for each event; a row of an event
--     that has its pointer costs some microseconds.
--   * lock_timeout is 50 ms within the trigger, and a transaction waits for the history once.
--   * Other tables are read by index, and only the rows that the payload needs: what a serializable
--     transaction has read may fail it.
--
-- Two limits are left, because nothing in a trigger can lift them: its time counts for the
-- statement_timeout, and a transaction that notifies fails when the queue is full at its end.

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
            message text,
            xact xid8 not null default pg_current_xact_id()
        );
    end if;
    if not exists (
        select from pg_catalog.pg_attribute
        where attrelid = 'tidegate.trigger_failures'::regclass and attname = 'xact'
    ) then
        alter table tidegate.trigger_failures
            add column xact xid8 not null default pg_current_xact_id();
    end if;
    -- As in migrations/schema/0002_broadcast_history.sql, which may run before or after.
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
end
$$;
comment on table tidegate.trigger_failures is
    'What went wrong in a cache invalidation trigger, newest last; never data of the row.';
comment on table tidegate.broadcast_history is
    'What the viewers of each event were told: the payload is what was notified, byte for byte, until somebody is forgotten.';

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
                'get_cache_invalidation_stats',
                'enable_cache_invalidation',
                'disable_cache_invalidation'
            )
            and (p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)) not in (
                ('manual_cache_invalidation', 'p_event_eid text, p_endpoint text DEFAULT NULL::text', 'jsonb'),
                ('get_cache_invalidation_stats',
                    'p_event_eid text DEFAULT NULL::text, p_minutes_back integer DEFAULT 60',
                    'TABLE(event_eid text, table_name text, operation text, count bigint, last_invalidation timestamp with time zone)'),
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
    v_xact text;
    v_noted text;
    v_count integer;
    v_id bigint;
begin
    -- Each row costs its transaction subtransactions, of which 64 are cheap.
    v_xact := pg_current_xact_id()::text || ' ';
    v_noted := current_setting('tidegate.failure_count', true);
    v_count := case when starts_with(v_noted, v_xact) then coalesce(substring(v_noted from ' (\d{1,9})$'), '0')::integer else 0 end;
    if v_count >= 10 then
        return;
    end if;
    perform set_config('tidegate.failure_count', v_xact || (v_count + 1), true);

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
        -- There is nowhere left to say so, and the write matters more. The exception has undone the
        -- count, without which each row of a statement would wait for a locked table again.
        perform set_config('tidegate.failure_count', v_xact || (coalesce(v_count, 0) + 1), true);
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

-- The endpoint of an artwork's bids, or null for one that has no round or no easel.
create or replace function tidegate.bids_endpoint(p_eid text, p_round text, p_easel text)
returns text
language plpgsql
set search_path = ''
as $$
begin
    return '/live/event/' || p_eid || '-' || nullif(p_round, '') || '-' || nullif(p_easel, '') || '/bids';
end
$$;

-- Where a row belongs: the eid of its event and by which id it was found, the artwork or the round
-- that it refers to, and the reference itself; null where it belongs to no event. Of other tables it reads the rows that are
-- needed, each by its index: a scan would have serializable transactions wait for, or fail with,
-- whoever writes another row of the table.
create or replace function tidegate.locate_change(p_table text, p_operation text, p_row jsonb)
returns jsonb
language plpgsql
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
declare
    v_uuid text;
    v_reference text;
    v_artwork jsonb;
    v_round jsonb;
    v_event_id text;
    v_found text;
    v_eid text;
    v_failed boolean;
begin
    v_uuid := '^[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}$';
    v_failed := false;
    v_eid := nullif(p_row ->> 'eid', '');

    -- The artwork, or a contestant's round, where the row itself does not say all that is needed.
    -- A column that the table lacks is found in `missing`.
    if p_table = 'art' then
        v_artwork := p_row;
    elsif p_table = 'round_contestants' then
        v_reference := p_row ->> 'round_id';
        if v_reference is not null
            and (
                (v_eid is null and p_row ->> 'event_id' is null)
                or p_row ->> 'round' is null
            )
        then
            begin
                if to_regclass('public.rounds') is not null then
                    select (
                        select jsonb_build_object(
                            'event_id', event_id, 'round_number', round_number, 'round', round)
                        from public.rounds as r where r.id = v_reference::uuid
                    ) into v_round
                    from (values (null, null, null)) as missing (event_id, round_number, round);
                end if;
            exception
                when others then
                    v_failed := true;
                    perform tidegate.record_failure(
                        p_table, p_operation, v_eid, sqlstate, 'looking up the round', sqlerrm);
            end;
        end if;
    elsif p_table not in ('events', 'event_artists') then
        v_reference := coalesce(p_row ->> 'art_uuid', p_row ->> 'art_id', p_row ->> 'artwork_id');
        if v_reference is not null
            and (
                (v_eid is null and p_row ->> 'event_id' is null)
                or p_table not in ('art_media', 'artwork_offers')
                and (p_row ->> 'round' is null or p_row ->> 'easel' is null or v_reference !~ v_uuid)
            )
        then
            begin
                if v_reference ~ v_uuid then
                    select (
                        select jsonb_build_object(
                            'id', id, 'event_id', event_id, 'round', round, 'easel', easel)
                        from public.art as a where a.id = v_reference::uuid
                    ) into v_artwork
                    from (values (null, null, null)) as missing (event_id, round, easel);
                else
                    select (
                        select jsonb_build_object(
                            'id', id, 'event_id', event_id, 'round', round, 'easel', easel)
                        from public.art as a where a.art_code = v_reference limit 1
                    ) into v_artwork
                    from (values (null, null, null, null)) as missing (id, event_id, round, easel);
                end if;
            exception
                when others then
                    v_failed := true;
                    perform tidegate.record_failure(
                        p_table, p_operation, v_eid, sqlstate, 'looking up the artwork', sqlerrm);
            end;
        end if;
    end if;

    -- The event: as the row says, else as its artwork or its round says.
    foreach v_event_id in array
        array[p_row ->> 'event_id', v_artwork ->> 'event_id', v_round ->> 'event_id']
    loop
        exit when v_eid is not null or p_table = 'events';
        continue when v_event_id is null;
        begin
            select e.eid into v_eid from public.events e where e.id = v_event_id::uuid;
            v_found := v_event_id;
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
        if not v_failed and p_table <> 'events'
            and (
                p_row ->> 'event_id' is not null
                or v_artwork ->> 'event_id' is not null
                or v_round ->> 'event_id' is not null
                or (v_reference is not null and v_artwork is null and v_round is null)
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
    return jsonb_build_object(
        'eid', v_eid, 'event_id', v_found, 'artwork', v_artwork, 'round', v_round,
        'reference', v_reference);
end
$$;

-- What a row of one of the tables means to the viewers of its event: the message without its stamp,
-- or null where locate_change() has found no place.
create or replace function tidegate.describe_change(p_table text, p_row jsonb, p_place jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_eid text;
    v_event text;
    v_artwork jsonb;
    v_round jsonb;
    v_easel text;
    v_message jsonb;
begin
    if p_place is null then
        return null;
    end if;
    v_eid := p_place ->> 'eid';
    v_artwork := nullif(p_place -> 'artwork', 'null');
    v_event := '/live/event/' || v_eid;
    v_message := jsonb_build_object('event_eid', v_eid);
    if p_table = 'events' then
        return v_message || jsonb_build_object(
            'type', 'event_status_changed', 'endpoints', jsonb_build_array(v_event));
    elsif p_table = 'event_artists' then
        return v_message || jsonb_build_object(
            'type', 'event_artists_updated',
            'endpoints', jsonb_build_array(v_event, v_event || '/artists'),
            'artist_id', p_row -> 'artist_id');
    elsif p_table = 'round_contestants' then
        return v_message || jsonb_build_object(
            'type', 'round_contestants_updated',
            'endpoints', jsonb_build_array(v_event, v_event || '/artists'),
            'artist_id', p_row -> 'artist_id',
            'round', coalesce(
                nullif(p_row -> 'round', 'null'),
                nullif(p_place #> '{round,round_number}', 'null'),
                p_place #> '{round,round}'));
    end if;

    v_message := v_message || jsonb_build_object('art_id', coalesce(v_artwork ->> 'id', p_place ->> 'reference'));
    if p_table = 'art_media' then
        if p_row ->> 'artwork_id' is not null then
            v_message := v_message || jsonb_build_object('artwork_id', p_row ->> 'artwork_id');
        end if;
        return v_message || jsonb_build_object(
            'type', 'media_updated', 'endpoints', jsonb_build_array(v_event || '/media'));
    elsif p_table = 'artwork_offers' then
        return v_message || jsonb_build_object(
            'type', 'artwork_offer_updated',
            'endpoints', jsonb_build_array(v_event),
            'offer_id', p_row -> 'id',
            'status', p_row -> 'status');
    end if;

    v_round := coalesce(nullif(p_row -> 'round', 'null'), v_artwork -> 'round');
    v_easel := coalesce(p_row ->> 'easel', v_artwork ->> 'easel');
    v_message := v_message || jsonb_build_object('round', v_round, 'easel', v_easel);
    if p_table = 'votes' then
        return v_message || jsonb_build_object(
            'type', 'vote_cast', 'endpoints', jsonb_build_array(v_event));
    elsif p_table = 'bids' then
        return v_message || jsonb_build_object(
            'type', 'bid_placed',
            -- Null is no endpoint.
            'endpoints', to_jsonb(array_remove(
                array[v_event, tidegate.bids_endpoint(v_eid, v_round #>> '{}', v_easel)], null)),
            'amount', p_row -> 'amount');
    elsif p_table = 'payment_processing' then
        return v_message || jsonb_build_object(
            'type', 'payment_status_changed',
            'endpoints', jsonb_build_array(v_event),
            'payment_status', coalesce(
                nullif(p_row -> 'status', 'null'), p_row -> 'payment_status'),
            'payment_amount', coalesce(
                nullif(p_row -> 'amount', 'null'), p_row -> 'payment_amount'));
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
set enable_seqscan = off
set jit = off
as $$
declare
    v_bid jsonb;
    v_winner text;
    v_nickname text;
begin
    v_winner := p_new ->> 'winner_id';
    begin
        if to_regclass('public.bids') is not null
            and (v_winner is null or p_new ->> 'current_bid' is null or p_new ->> 'currency' is null)
        then
            select (
                select jsonb_build_object(
                    'person_id', person_id, 'amount', b.amount, 'currency_code', currency_code)
                from public.bids as b
                where b.art_id = (p_new ->> 'id')::uuid
                    and (v_winner is null or person_id::text = v_winner)
                order by b.amount desc nulls last
                limit 1
            ) into v_bid
            from (values (null, null)) as missing (person_id, currency_code);
            v_winner := coalesce(v_winner, v_bid ->> 'person_id');
        end if;
    exception
        when others then
            perform tidegate.record_failure(
                'art', 'UPDATE', p_eid, sqlstate, 'looking up the winning bid', sqlerrm);
    end;
    begin
        if v_winner is not null and to_regclass('public.people') is not null then
            select (
                select nickname::text from public.people as p where p.id = v_winner::uuid
            ) into v_nickname
            from (values (null)) as missing (nickname);
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

-- The payload itself, or a pointer in its place where NOTIFY would refuse it.
create or replace function tidegate.fit(p_table text, p_operation text, p_payload jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
begin
    if octet_length(p_payload::text) < 8000 then
        return p_payload;
    end if;
    perform tidegate.record_failure(
        p_table, p_operation, p_payload ->> 'event_eid', '22023',
        'a payload of ' || octet_length(p_payload::text) || ' bytes was replaced by a pointer');
    return tidegate.pointer(p_payload);
end
$$;

-- What invalidates the whole event of a payload, under the payload's id if it has one.
create or replace function tidegate.pointer(p_payload jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_event text;
begin
    v_event := '/live/event/' || (p_payload ->> 'event_eid');
    return jsonb_strip_nulls(jsonb_build_object('id', p_payload -> 'id'))
        || jsonb_build_object(
            'type', p_payload -> 'type',
            'event_eid', p_payload -> 'event_eid',
            'endpoints', jsonb_build_array(v_event, v_event || '/media'),
            'pointer', true
        ) || tidegate.stamp();
end
$$;

-- Writes a payload into the history, and gives what to notify: the payload with the id of its row,
-- or without an id where the history cannot be written, which is recorded.
create or replace function tidegate.keep(p_table text, p_operation text, p_payload jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_id bigint;
    v_payload jsonb;
begin
    -- A statement of many rows waits for a locked history once.
    if current_setting('tidegate.history_failed', true) = pg_current_xact_id()::text then
        raise exception 'given up after an earlier failure of this transaction'
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    v_id := nextval('tidegate.broadcast_history_id_seq');
    v_payload := tidegate.fit(p_table, p_operation, p_payload || jsonb_build_object('id', v_id));
    insert into tidegate.broadcast_history (id, eid, type, table_name, operation, endpoints, payload)
    overriding system value
    values (
        v_id, v_payload ->> 'event_eid', v_payload ->> 'type', p_table, p_operation,
        array(select jsonb_array_elements_text(v_payload -> 'endpoints')),
        v_payload::text
    );
    return v_payload;
exception
    when others then
        perform set_config('tidegate.history_failed', pg_current_xact_id()::text, true);
        perform tidegate.record_failure(
            p_table, p_operation, p_payload ->> 'event_eid', sqlstate, 'writing the history', sqlerrm);
        return tidegate.fit(p_table, p_operation, p_payload);
end
$$;

-- Writes a payload into the history, and gives what to notify. A transaction tells 50 messages,
-- because the row of each is a subtransaction, of which 64 are cheap, and then a pointer for each
-- event that it changes further; null where that has been told already.
--
-- What is noted for this stands in settings that a rolled back savepoint takes along, with the
-- transaction's id: `tidegate.told` is how many messages, `tidegate.pointed` for what pointers stand.
-- They are believed only with that id, because a session, or its role, may set what it likes.
create or replace function tidegate.admit(p_table text, p_operation text, p_payload jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_xact text;
    v_noted text;
    v_count integer;
    v_eid text;
begin
    v_xact := pg_current_xact_id()::text || ' ';
    v_noted := current_setting('tidegate.told', true);
    v_count := case when starts_with(v_noted, v_xact) then coalesce(substring(v_noted from ' (\d{1,9})$'), '0')::integer else 0 end;
    if v_count < 50 then
        perform set_config('tidegate.told', v_xact || (v_count + 1), true);
        return tidegate.keep(p_table, p_operation, p_payload);
    end if;
    v_eid := p_payload ->> 'event_eid';
    v_noted := current_setting('tidegate.pointed', true);
    v_noted := case when starts_with(v_noted, v_xact) then substr(v_noted, length(v_xact) + 1) else '|.' end;
    if strpos(v_noted, '|' || v_eid || '|') > 0 then
        return null;
    end if;
    perform set_config('tidegate.pointed', v_xact || '|' || v_eid || v_noted, true);
    return tidegate.keep(p_table, p_operation, tidegate.pointer(p_payload));
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
    v_stamp jsonb;
    v_payload jsonb;
begin
    if p_message is null then
        return;
    end if;
    v_eid := p_message ->> 'event_eid';
    v_stamp := tidegate.stamp();
    v_payload := tidegate.admit(p_table, p_operation, p_message || v_stamp);
    if v_payload is null then
        return;
    end if;
    perform tidegate.send(p_table, p_operation, v_eid, 'cache_invalidate_' || v_eid, v_payload);
    perform tidegate.send(
        p_table, p_operation, v_eid, 'global_cache_stats',
        jsonb_build_object('event_eid', v_eid, 'table', p_table, 'operation', p_operation)
            || v_stamp - 'cache_version');
end
$$;

-- Whether a pointer of this transaction stands for whatever changes at a row's place, so that
-- nothing more is to be told of it. By p_key the next row is known without a look into any table.
create or replace function tidegate.is_pointed(
    p_table text,
    p_operation text,
    p_row jsonb,
    p_key text
)
returns boolean
language plpgsql
set search_path = ''
as $$
declare
    v_xact text;
    v_pointed text;
    v_place jsonb;
begin
    v_xact := pg_current_xact_id()::text || ' ';
    v_pointed := current_setting('tidegate.pointed', true);
    v_place := tidegate.locate_change(p_table, p_operation, p_row);
    if v_place is null then
        return true;
    end if;
    if strpos(v_pointed, '|' || (v_place ->> 'eid') || '|') = 0 then
        return false;
    end if;
    -- A reference of the row says where it belongs unless its event_id, which led nowhere, was first.
    if p_key is not null and octet_length(v_pointed) < 65536
        and (p_row ->> 'event_id' is null or p_row ->> 'event_id' = v_place ->> 'event_id')
        and strpos(v_pointed, p_key) = 0
    then
        perform set_config(
            'tidegate.pointed',
            v_xact || rtrim(p_key, '|') || substr(v_pointed, length(v_xact) + 1),
            true);
    end if;
    return true;
end
$$;

-- An artwork's message with the endpoint of its bids, if it has one.
create or replace function tidegate.with_bids(p_message jsonb, p_artwork jsonb)
returns jsonb
language plpgsql
set search_path = ''
as $$
declare
    v_bids text;
begin
    v_bids := tidegate.bids_endpoint(
        p_message ->> 'event_eid', p_artwork ->> 'round', p_artwork ->> 'easel');
    if v_bids is null then
        return p_message;
    end if;
    return jsonb_set(p_message, '{endpoints}', (p_message -> 'endpoints') || to_jsonb(v_bids));
end
$$;

-- The trigger of all tables, row by row. With transition tables a row past the pointer would cost 4 µs
-- instead of 15, but Postgres has none for two operations at once and none for partitions: three names
-- for each table where operators know one, and silence about what is written into a partition.
create or replace function tidegate.cache_invalidation()
returns trigger
language plpgsql
security definer
set search_path = ''
set lock_timeout = '50ms'
-- A plan for one row alone would copy the row with all that is stored apart of it.
set plan_cache_mode = force_generic_plan
as $$
declare
    v_table text;
    v_root regclass;
    v_pointed text;
    v_has_pointers boolean;
    v_key text;
    v_status text;
    v_old_key text;
    v_old_status text;
    v_old jsonb;
    v_new jsonb;
    v_row jsonb;
    v_message jsonb;
    v_former jsonb;
    v_sale jsonb;
    v_eid text;
    v_was_elsewhere boolean;
begin
    v_table := tg_table_name;
    begin
        -- The rows of a partition are its table's.
        v_root := pg_catalog.pg_partition_root(tg_relid);
        if v_root <> tg_relid then
            select c.relname into strict v_table from pg_catalog.pg_class c where c.oid = v_root;
        end if;

        -- Of both rows the columns that are needed and no other, because a row may be large. What
        -- the table lacks is found in `missing`. By the key of a row its event is found.
        v_pointed := current_setting('tidegate.pointed', true);
        v_has_pointers := coalesce(starts_with(v_pointed, pg_current_xact_id()::text || ' '), false);
        if v_has_pointers then
            begin
                if tg_op <> 'INSERT' then
                    select k.key, k.status into v_old_key, v_old_status
                    from (values (null, null, null, null, null, null, null)) as missing (
                        eid, event_id, round_id, art_uuid, art_id, artwork_id, status
                    ),
                    lateral (
                        select
                            '|' || coalesce(
                                nullif(eid::text, ''),
                                'event ' || event_id::text,
                                'round ' || round_id::text,
                                'artwork ' || coalesce(art_uuid::text, art_id::text, artwork_id::text)
                            ) || '|' as key,
                            status::text as status
                        from (select old.*) as written
                    ) as k;
                end if;
                if tg_op <> 'DELETE' then
                    select k.key, k.status into v_key, v_status
                    from (values (null, null, null, null, null, null, null)) as missing (
                        eid, event_id, round_id, art_uuid, art_id, artwork_id, status
                    ),
                    lateral (
                        select
                            '|' || coalesce(
                                nullif(eid::text, ''),
                                'event ' || event_id::text,
                                'round ' || round_id::text,
                                'artwork ' || coalesce(art_uuid::text, art_id::text, artwork_id::text)
                            ) || '|' as key,
                            status::text as status
                        from (select new.*) as written
                    ) as k;
                end if;
            exception
                when datatype_mismatch then
                    -- See below: the row is described.
                    v_key := null;
                    v_old_key := null;
            end;
            -- This is all that happens for most rows of a large statement. (strpos() would count the
            -- characters before what it finds, which takes longer.)
            if split_part(v_pointed, coalesce(v_key, v_old_key), 2) <> ''
                and split_part(v_pointed, coalesce(v_old_key, v_key), 2) <> ''
                and (v_table <> 'art' or v_status is distinct from 'sold' or v_old_status = 'sold')
            then
                return null;
            end if;
        end if;
        begin
            if tg_op <> 'INSERT' then
                select r.written into v_old
                from (values (
                    null, null, null, null, null, null, null, null, null, null, null, null, null,
                    null, null, null, null, null
                )) as missing (
                    eid, event_id, round_id, art_uuid, art_id, artwork_id, id, art_code, artist_id,
                    round, easel, status, payment_status, amount, payment_amount, current_bid,
                    currency, winner_id
                ),
                lateral (
                    select jsonb_build_object(
                        'eid', eid, 'event_id', event_id, 'round_id', round_id, 'art_uuid', art_uuid,
                        'art_id', art_id, 'artwork_id', artwork_id, 'id', id, 'art_code', art_code,
                        'artist_id', artist_id, 'round', round, 'easel', easel, 'status', status,
                        'payment_status', payment_status, 'amount', amount,
                        'payment_amount', payment_amount, 'current_bid', current_bid,
                        'currency', currency, 'winner_id', winner_id
                    ) as written
                    from (select old.*) as written
                ) as r;
            end if;
            if tg_op <> 'DELETE' then
                select r.written into v_new
                from (values (
                    null, null, null, null, null, null, null, null, null, null, null, null, null,
                    null, null, null, null, null
                )) as missing (
                    eid, event_id, round_id, art_uuid, art_id, artwork_id, id, art_code, artist_id,
                    round, easel, status, payment_status, amount, payment_amount, current_bid,
                    currency, winner_id
                ),
                lateral (
                    select jsonb_build_object(
                        'eid', eid, 'event_id', event_id, 'round_id', round_id, 'art_uuid', art_uuid,
                        'art_id', art_id, 'artwork_id', artwork_id, 'id', id, 'art_code', art_code,
                        'artist_id', artist_id, 'round', round, 'easel', easel, 'status', status,
                        'payment_status', payment_status, 'amount', amount,
                        'payment_amount', payment_amount, 'current_bid', current_bid,
                        'currency', currency, 'winner_id', winner_id
                    ) as written
                    from (select new.*) as written
                ) as r;
            end if;
        exception
            when datatype_mismatch then
                -- A session reads the columns as they were when it first wrote the table, and the
                -- type of one of them has changed since.
                v_old := case when tg_op <> 'INSERT' then to_jsonb(old) end;
                v_new := case when tg_op <> 'DELETE' then to_jsonb(new) end;
        end;
        v_row := coalesce(v_new, v_old);
        -- Viewers see how a payment ends, and nothing of its way there.
        if v_table = 'payment_processing' and (
            coalesce(v_new ->> 'status', v_new ->> 'payment_status', '') not in ('completed', 'failed')
            or jsonb_build_array(
                v_old -> 'status', v_old -> 'payment_status', v_old -> 'amount',
                v_old -> 'payment_amount', v_old -> 'art_id'
            ) = jsonb_build_array(
                v_new -> 'status', v_new -> 'payment_status', v_new -> 'amount',
                v_new -> 'payment_amount', v_new -> 'art_id'
            )
        ) then
            return null;
        end if;
        if not v_has_pointers
            or not tidegate.is_pointed(v_table, tg_op, v_row, coalesce(v_key, v_old_key))
        then
            v_message := tidegate.describe_change(
                v_table, v_row, tidegate.locate_change(v_table, tg_op, v_row));
        end if;

        -- A gateway learns of a new artwork's bids by this, and so what a pointer stands for.
        if v_table = 'art' and tg_op = 'INSERT' then
            v_message := tidegate.with_bids(v_message, v_new);
        end if;

        -- A row that moved concerns the viewers of the place that it left, too.
        v_was_elsewhere := v_table = 'art' and tg_op = 'UPDATE'
            and jsonb_build_array(v_old -> 'round', v_old -> 'easel')
                <> jsonb_build_array(v_new -> 'round', v_new -> 'easel');
        if v_was_elsewhere or tg_op = 'UPDATE'
            and jsonb_build_array(
                v_old -> 'eid', v_old -> 'event_id', v_old -> 'round_id', v_old -> 'art_uuid',
                v_old -> 'art_id', v_old -> 'artwork_id'
            ) <> jsonb_build_array(
                v_new -> 'eid', v_new -> 'event_id', v_new -> 'round_id', v_new -> 'art_uuid',
                v_new -> 'art_id', v_new -> 'artwork_id'
            )
        then
            if not v_has_pointers or not tidegate.is_pointed(v_table, tg_op, v_old, v_old_key) then
                v_former := tidegate.describe_change(
                    v_table, v_old, tidegate.locate_change(v_table, tg_op, v_old));
            end if;
            -- The bids of an artwork are found under its round and easel.
            if v_was_elsewhere then
                v_message := tidegate.with_bids(v_message, v_new);
                v_former := tidegate.with_bids(v_former, v_old);
            end if;
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

        -- A sale is told whatever stands for the rest.
        if v_table = 'art' and tg_op = 'UPDATE'
            and v_new ->> 'status' = 'sold' and v_old ->> 'status' is distinct from 'sold'
        then
            v_eid := coalesce(
                v_message ->> 'event_eid', tidegate.locate_change(v_table, tg_op, v_new) ->> 'eid');
            if v_eid is not null then
                v_sale := tidegate.describe_sale(v_old, v_new, v_eid);
            end if;
        end if;
    exception
        when others then
            perform tidegate.record_failure(
                v_table, tg_op, null, sqlstate, 'describing the change', sqlerrm);
    end;

    perform tidegate.publish(v_table, tg_op, v_message);
    perform tidegate.publish(v_table, tg_op, v_former);
    if v_sale is not null then
        perform tidegate.send(
            v_table, tg_op, v_sale ->> 'event_eid',
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

-- Which of these events exist, and whether everybody may know that: those that are `enabled`, or,
-- where events have no such column, all unless row security hides some of them.
create or replace function tidegate.event_standings(p_eids text[])
returns table (event_eid text, is_public boolean)
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
    return query
    select e.eid::text, coalesce(e.enabled, false) from public.events e where e.eid = any (p_eids);
exception
    when undefined_table then
        return;
    when undefined_column or datatype_mismatch then
        begin
            return query
            select e.eid::text, not c.relrowsecurity
            from public.events e, pg_catalog.pg_class c
            where e.eid = any (p_eids) and c.oid = 'public.events'::regclass;
        exception
            when undefined_column then
                return;
        end;
end
$$;

-- Every endpoint of an event: main, media, artists, and, if everybody may know the event, the bids
-- of each artwork: whoever asks for the list may be anybody.
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
        select distinct a.round, a.easel
        from (
            select e.id from public.events as e
            where e.eid = p_eid
                and exists (
                    select from tidegate.event_standings(array[p_eid]) s where s.is_public)
        ) as event
        cross join (values (null, null)) as missing (round, easel)
        cross join lateral (
            select round::text as round, easel::text as easel
            from public.art as a where a.event_id = event.id
        ) as a
    ) as artwork
    where artwork.round <> '' and artwork.easel <> ''
    order by artwork.round, artwork.easel;
exception
    when undefined_table or undefined_column then
        raise warning 'the artworks of % cannot be read: %', p_eid, sqlerrm;
end
$$;

-- The ids of at most so many events, by which a gateway tells them from those that a client invents.
create or replace function tidegate.known_events(p_max integer)
returns setof text
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
    return query select e.eid::text from public.events e where e.eid is not null limit p_max;
exception
    when undefined_table or undefined_column then
        -- A database without events: those of the history are known.
        return;
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
set lock_timeout = '50ms'
as $$
declare
    v_event text;
    v_payload jsonb;
    v_told jsonb;
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
    v_told := tidegate.admit('manual', 'MANUAL', v_payload);
    if v_told is null then
        return v_payload;
    end if;
    v_payload := v_told;
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

-- How often each table has invalidated each event, by operation, the latest first. Of a
-- transaction at most 50 messages count, and a pointer for each event.
create or replace function public.get_cache_invalidation_stats(
    p_event_eid text default null,
    p_minutes_back integer default 60
)
returns table (
    event_eid text,
    table_name text,
    operation text,
    count bigint,
    last_invalidation timestamptz
)
language sql
stable
security definer
set search_path = ''
as $$
    select h.eid, h.table_name, h.operation, count(*), max(h.at)
    from tidegate.broadcast_history h
    where h.at >= statement_timestamp() - make_interval(mins => p_minutes_back)
        and (p_event_eid is null or h.eid = p_event_eid)
    group by h.eid, h.table_name, h.operation
    order by max(h.at) desc, h.eid, h.table_name, h.operation
$$;

-- Deletes what the history has kept longer than p_keep, the oldest first and at most p_limit rows,
-- and gives their number. Rows that another session is deleting are skipped.
create or replace function tidegate.forget_history(p_keep interval, p_limit integer default 1000)
returns integer
language plpgsql
security definer
set search_path = ''
set lock_timeout = '1s'
as $$
declare
    v_before timestamptz;
    v_count integer;
begin
    if p_keep is null or p_keep < interval '0' then
        raise exception 'the history is kept for an interval of time'
            using errcode = 'invalid_parameter_value';
    end if;
    v_before := clock_timestamp() - p_keep;
    with batch as materialized (
        select h.id
        from tidegate.broadcast_history h
        where h.at < v_before
        order by h.at
        limit p_limit
        for update skip locked
    )
    delete from tidegate.broadcast_history h using batch where h.id = batch.id;
    get diagnostics v_count = row_count;
    return v_count;
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
            ('art_media', 'cache_invalidate_media_trigger', 'INSERT OR DELETE OR UPDATE'),
            ('event_artists', 'cache_invalidate_event_artists_trigger', 'INSERT OR DELETE OR UPDATE'),
            ('round_contestants', 'cache_invalidate_round_contestants_trigger', 'INSERT OR DELETE OR UPDATE'),
            ('artwork_offers', 'cache_invalidate_artwork_offers_trigger', 'INSERT OR DELETE OR UPDATE'),
            ('payment_processing', 'cache_invalidate_payment_processing_trigger', 'UPDATE'),
            ('events', 'cache_invalidate_events_trigger', 'UPDATE')
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
    v_table regclass;
begin
    revoke all on schema tidegate from public;
    revoke all on all tables in schema tidegate from public;
    revoke all on all sequences in schema tidegate from public;
    for v_role in
        select quote_ident(r.rolname) from pg_catalog.pg_roles r
        where r.rolname in ('anon', 'authenticated')
    loop
        execute format('revoke all on schema tidegate from %s', v_role);
        execute format('revoke all on all tables in schema tidegate from %s', v_role);
        execute format('revoke all on all sequences in schema tidegate from %s', v_role);
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
                'get_cache_invalidation_stats',
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
            'grant execute on function public.manual_cache_invalidation(text, text), '
                'public.get_cache_invalidation_stats(text, integer) to %I',
            v_role);
    end loop;
    if exists (select from pg_catalog.pg_roles where rolname = 'tidegate') then
        grant usage on schema tidegate to tidegate;
        -- Reading alone: who may delete may lock the whole table, and so hold up every write.
        revoke insert, update, delete, truncate
            on tidegate.trigger_failures, tidegate.broadcast_history from tidegate;
        grant select on tidegate.trigger_failures, tidegate.broadcast_history to tidegate;
        grant execute on function
            tidegate.event_endpoints(text), tidegate.event_standings(text[]),
            tidegate.known_events(integer),
            tidegate.forget_history(interval, integer) to tidegate;
        -- As in migrations/schema/, which may run before or after.
        for v_table in
            select c.oid::regclass
            from pg_catalog.pg_class c
            where c.relnamespace = 'tidegate'::regnamespace
                and c.relname in ('gateways', 'lost_sockets', 'recent_topics', 'revocations')
        loop
            execute format('grant select, insert, update, delete on %s to tidegate', v_table);
        end loop;
        if to_regclass('tidegate.migrations') is not null then
            grant select on tidegate.migrations to tidegate;
        end if;
    end if;
    -- As in migrations/schema/0004_private_channels.sql, which may run before or after.
    if to_regprocedure('tidegate.open_private_channels()') is not null then
        perform tidegate.open_private_channels();
    end if;
end
$$;

do $$
begin
    perform tidegate.grant_access();
    perform public.enable_cache_invalidation();
end
$$;

-- What an earlier version of this file has left, which nothing calls.
do $$
declare
    v_function regprocedure;
begin
    for v_function in
        select p.oid::regprocedure from pg_catalog.pg_proc p
        where p.oid in (
            to_regprocedure('tidegate.remember(text, text, jsonb)'),
            to_regprocedure('tidegate.try_remember(text, text, jsonb)'),
            to_regprocedure('tidegate.describe_change(text, text, jsonb)')
        )
    loop
        execute format('drop function %s', v_function);
    end loop;
end
$$;
