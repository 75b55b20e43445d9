# Asks a web server for a page again and again, and says for how long there was no answer.
#
#   watch.pl stream|fetches HOST SECONDS
#
# stream: one TCP connection; fetches: a new one each time. Ends after SECONDS, or two seconds after an
# interruption (half a second without an answer, or a failure) is over; a stream also when it breaks.
# The last line: `watched ANSWERS LONGEST_MS ENDED [ENDED_AFTER_MS]`.
use strict;
use warnings;
use IO::Select;
use IO::Socket;
use Socket qw(:all);

# Monotonic, to a hundredth of a second; the image has no Time::HiRes.
sub now {
    open(my $uptime, '<', '/proc/uptime') or die "/proc/uptime: $!";
    return (split ' ', <$uptime>)[0];
}
sub pause { select(undef, undef, undef, 0.05) }

my ($mode, $host, $seconds) = @ARGV;
$| = 1;
my $stream = $mode eq 'stream';
my $begun = now();
my ($last, $longest, $answers, $interrupted, $recovered) = ($begun, 0, 0, 0, 0);
my $socket;

sub address {
    my $v6 = inet_pton(AF_INET6, $host);
    return $v6 ? (PF_INET6, pack_sockaddr_in6(80, $v6)) : (PF_INET, pack_sockaddr_in(80, inet_aton($host)));
}

# A connection, or nothing within a second.
sub open_socket {
    my ($family, $address) = address();
    socket(my $s, $family, SOCK_STREAM, 0) or die "socket: $!";
    $s->blocking(0);
    if (!connect($s, $address)) {
        return unless IO::Select->new($s)->can_write(1);
        return if unpack('i', getsockopt($s, SOL_SOCKET, SO_ERROR));
    }
    return $s;
}

sub done {
    my ($how, $after) = @_;
    printf "watched %d %d %s%s\n", $answers, $longest * 1000, $how, defined $after ? sprintf(' %d', $after * 1000) : '';
    exit 0;
}

# One answer within a time: '' if it came, else how it failed.
sub answer {
    my ($s, $limit) = @_;
    local $SIG{PIPE} = 'IGNORE';
    my $sent = syswrite($s, "GET /peer HTTP/1.1\r\nHost: web\r\n\r\n");
    return $!{ECONNRESET} || $!{EPIPE} ? 'reset' : "$!" unless $sent;
    my $got = '';
    my $end = now() + $limit;
    while ($got !~ /\r\n\r\n.*\}/s) {
        my $left = $end - now();
        return 'silent' if $left <= 0 || !IO::Select->new($s)->can_read($left);
        my $n = sysread($s, $got, 65536, length $got);
        return 'closed' if defined $n && $n == 0;
        return $!{ECONNRESET} ? 'reset' : "error-$!{errno}" . int($!) unless defined $n;
    }
    return '';
}

print "begun\n" unless $stream;
while (1) {
    done('well') if now() - $begun > $seconds || ($recovered && now() - $recovered > 2);
    $socket = open_socket() unless $stream && $socket;
    if (!$socket) {
        die "no connection\n" if $stream;
        $interrupted = 1;
        pause();
        next;
    }
    my $left = $seconds - (now() - $begun);
    my $how = answer($socket, $stream ? ($left > 1 ? $left : 1) : 1);
    if ($how eq '') {
        print "begun\n" if $stream && !$answers;
        my $gap = now() - $last;
        $longest = $gap if $gap > $longest;
        $answers++;
        $recovered ||= now() if $interrupted || ($answers > 1 && $gap > 0.5);
        $last = now();
    } elsif ($stream) {
        my $gap = now() - $last;
        $longest = $gap if $gap > $longest;
        done($how, $gap);
    } else {
        $interrupted = 1;
    }
    $socket = undef unless $stream;
    pause();
}
