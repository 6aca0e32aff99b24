// The part of boost/any.hpp that HumanEval-X uses, in C++11. The compiler takes Boost's own where it is installed.
#ifndef FEDTUNE_STANDIN_BOOST_ANY_HPP
#define FEDTUNE_STANDIN_BOOST_ANY_HPP

#include <memory>
#include <type_traits>
#include <typeinfo>
#include <utility>

namespace boost {

class bad_any_cast : public std::bad_cast {
 public:
  const char* what() const noexcept override { return "boost::bad_any_cast"; }
};

class any {
  struct Holder {
    virtual ~Holder() {}
    virtual const std::type_info& type() const noexcept = 0;
    virtual Holder* clone() const = 0;
  };
  template <class T>
  struct Held : Holder {
    T value;
    template <class U>
    explicit Held(U&& from) : value(std::forward<U>(from)) {}
    const std::type_info& type() const noexcept override { return typeid(T); }
    Holder* clone() const override { return new Held(value); }
  };
  std::unique_ptr<Holder> holder_;

  template <class T>
  friend T* any_cast(any*) noexcept;

 public:
  any() noexcept {}
  any(const any& other) : holder_(other.holder_ ? other.holder_->clone() : nullptr) {}
  any(any&& other) noexcept : holder_(std::move(other.holder_)) {}
  template <class T, class D = typename std::decay<T>::type,
            class = typename std::enable_if<!std::is_same<D, any>::value>::type>
  any(T&& value) : holder_(new Held<D>(std::forward<T>(value))) {}

  any& operator=(any other) noexcept {
    swap(other);
    return *this;
  }
  any& swap(any& other) noexcept {
    holder_.swap(other.holder_);
    return *this;
  }
  bool empty() const noexcept { return !holder_; }
  void clear() noexcept { holder_.reset(); }
  const std::type_info& type() const noexcept { return holder_ ? holder_->type() : typeid(void); }
};

template <class T>
T* any_cast(any* from) noexcept {
  if (!from || from->type() != typeid(T)) return nullptr;
  return &static_cast<any::Held<T>*>(from->holder_.get())->value;
}

template <class T>
const T* any_cast(const any* from) noexcept {
  return any_cast<T>(const_cast<any*>(from));
}

template <class T>
T any_cast(any& from) {
  auto* held = any_cast<typename std::remove_cv<typename std::remove_reference<T>::type>::type>(&from);
  if (!held) throw bad_any_cast();
  return *held;
}

template <class T>
T any_cast(const any& from) {
  auto* held = any_cast<typename std::remove_cv<typename std::remove_reference<T>::type>::type>(&from);
  if (!held) throw bad_any_cast();
  return *held;
}

}  // namespace boost

#endif
