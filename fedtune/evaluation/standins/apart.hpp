// Calls an answer in a process of its own, a copy of that of the tests without the run's nonce and the descriptor
// that wants it, and brings back what it returns: numbers, strings, and vectors, lists, sets, maps and pairs of them.
// Tests do not see what an answer does to variables of theirs.
#pragma once
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <list>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fedtune_apart {

inline void fail(const char* why) {
  fprintf(stderr, "the answer's process %s\n", why);
  _exit(1);
}

struct Reader {
  const char *at, *end;
  void take(void* to, size_t bytes) {
    if (size_t(end - at) < bytes) fail("told no value");
    memcpy(to, at, bytes);
    at += bytes;
  }
};

template <class T, class = void>
struct Value;  // of a type that is not known here

template <class T>
struct Value<T, typename std::enable_if<std::is_arithmetic<T>::value>::type> {
  static void put(std::string& out, const T& value) { out.append(reinterpret_cast<const char*>(&value), sizeof value); }
  static T get(Reader& in) {
    T value;
    in.take(&value, sizeof value);
    return value;
  }
};

template <>
struct Value<bool> {
  static void put(std::string& out, bool value) { out += value ? '1' : '0'; }
  static bool get(Reader& in) { return Value<char>::get(in) == '1'; }
};

template <class A, class B>
struct Value<std::pair<A, B>> {
  typedef typename std::remove_const<A>::type First;
  static void put(std::string& out, const std::pair<A, B>& value) {
    Value<First>::put(out, value.first);
    Value<B>::put(out, value.second);
  }
  static std::pair<First, B> get(Reader& in) {
    First first = Value<First>::get(in);
    return std::pair<First, B>(first, Value<B>::get(in));
  }
};

template <class C, class Item>
struct Items {
  static void put(std::string& out, const C& value) {
    Value<size_t>::put(out, value.size());
    for (const Item& item : value) Value<Item>::put(out, item);
  }
  static C get(Reader& in) {
    C value;
    for (size_t left = Value<size_t>::get(in); left; --left) value.insert(value.end(), Value<Item>::get(in));
    return value;
  }
};

template <>
struct Value<std::string> : Items<std::string, char> {};
template <class T>
struct Value<std::vector<T>> : Items<std::vector<T>, T> {};
template <class T>
struct Value<std::list<T>> : Items<std::list<T>, T> {};
template <class T>
struct Value<std::set<T>> : Items<std::set<T>, T> {};
template <class K, class V>
struct Value<std::map<K, V>> : Items<std::map<K, V>, std::pair<const K, V>> {};

template <class Call>
auto apart(Call call) -> typename std::decay<decltype(call())>::type {
  typedef Value<typename std::decay<decltype(call())>::type> Result;
  int ends[2];
  // no other process may look into this one
  if (prctl(PR_SET_DUMPABLE, 0UL, 0UL, 0UL, 0UL) || pipe(ends)) fail("could not be made");
  pid_t child = fork();
  if (child < 0) fail("could not be made");
  if (child == 0) {
    close(ends[0]);
    close(0);
    close(3);
    std::string out, sent;
    Result::put(out, call());
    Value<size_t>::put(sent, out.size());
    sent += out;
    for (size_t done = 0; done < sent.size();) {
      ssize_t now = write(ends[1], sent.data() + done, sent.size() - done);
      if (now <= 0) _exit(1);
      done += now;
    }
    fflush(stdout);
    _exit(0);
  }
  close(ends[1]);
  std::string got;
  char piece[65536];
  size_t length = 0;
  while (got.size() < sizeof length || got.size() - sizeof length < length) {
    ssize_t now = read(ends[0], piece, sizeof piece);
    if (now <= 0) break;
    got.append(piece, now);
    if (got.size() >= sizeof length) memcpy(&length, got.data(), sizeof length);
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) {
    signal(WTERMSIG(status), SIG_DFL);
    kill(getpid(), WTERMSIG(status));
  }
  if (status != 0 || got.size() != sizeof length + length || length == 0) fail("ended");
  Reader in = {got.data() + sizeof length, got.data() + got.size()};
  return Result::get(in);
}

// Sends the nonce of the run.
inline void passed() {
  char nonce[64];
  ssize_t length = read(0, nonce, sizeof nonce);
  if (length <= 0 || write(3, nonce, length) != length) fail("had the nonce");
}

}  // namespace fedtune_apart

#ifdef BOOST_ANY_INCLUDED
#include <boost/any.hpp>
namespace fedtune_apart {
template <>
struct Value<boost::any> {
  template <class T>
  static bool put_if(char letter, std::string& out, const boost::any& value) {
    const T* held = boost::any_cast<T>(&value);
    if (held) Value<T>::put(out += letter, *held);
    return held != nullptr;
  }
  static void put(std::string& out, const boost::any& value) {
    if (value.empty()) out += 'n';
    else if (!put_if<int>('i', out, value) && !put_if<double>('d', out, value) && !put_if<float>('f', out, value) &&
             !put_if<std::string>('s', out, value))
      _exit(1);
  }
  static boost::any get(Reader& in) {
    char letter = Value<char>::get(in);
    if (letter == 'i') return Value<int>::get(in);
    if (letter == 'd') return Value<double>::get(in);
    if (letter == 'f') return Value<float>::get(in);
    if (letter == 's') return Value<std::string>::get(in);
    return boost::any();
  }
};
}  // namespace fedtune_apart
#endif
